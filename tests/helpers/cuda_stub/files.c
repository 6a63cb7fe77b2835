// Counts the calls by which a process looks at the file system, which no call on the hot path may.

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>

#include "stub.h"

long stub_file_calls;

// Defines `name` as libc's function of this name, counted.
#define COUNTED(result, name, parameters, arguments) \
  result name parameters {                           \
    static result(*real) parameters;                 \
    if (!real) real = dlsym(RTLD_NEXT, #name);       \
    stub_count(&stub_file_calls);                    \
    return real arguments;                           \
  }

#define COUNTED_OPEN(name)                                                  \
  int name(const char* path, int flags, ...) {                              \
    static int (*real)(const char*, int, ...);                              \
    if (!real) real = dlsym(RTLD_NEXT, #name);                              \
    va_list rest;                                                           \
    va_start(rest, flags);                                                  \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                           \
    stub_count(&stub_file_calls);                                           \
    return real(path, flags, mode);                                         \
  }

COUNTED_OPEN(open)
COUNTED_OPEN(open64)
COUNTED(int, stat, (const char* path, struct stat* to), (path, to))
COUNTED(int, stat64, (const char* path, struct stat64* to), (path, to))
COUNTED(int, lstat, (const char* path, struct stat* to), (path, to))
COUNTED(int, lstat64, (const char* path, struct stat64* to), (path, to))
COUNTED(int, fstatat, (int folder, const char* path, struct stat* to, int flags),
        (folder, path, to, flags))
COUNTED(int, fstatat64, (int folder, const char* path, struct stat64* to, int flags),
        (folder, path, to, flags))
COUNTED(int, access, (const char* path, int mode), (path, mode))
COUNTED(int, faccessat, (int folder, const char* path, int mode, int flags),
        (folder, path, mode, flags))
COUNTED(ssize_t, readlink, (const char* path, char* to, size_t size), (path, to, size))
COUNTED(DIR*, opendir, (const char* path), (path))
