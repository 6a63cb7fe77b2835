// What is loaded: modules of the driver, and the kernels that nvcc registers as a library loads.

#define _GNU_SOURCE
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "stub.h"

enum { FAT_BINARY = 0xBA55ED50u, CUDA_MACHINE = 190, CUDA_13_ABI = 8 };

typedef struct {
  uint32_t magic;
  uint16_t version, header_size;
  uint64_t size;
} FatBinary;

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t elf_size(const Elf64_Ehdr* header) {
  const char* start = (const char*)header;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(start + header->e_shoff);
  size_t size = sizeof *header;
  size = larger(size, header->e_shoff + (size_t)header->e_shnum * header->e_shentsize);
  size = larger(size, header->e_phoff + (size_t)header->e_phnum * header->e_phentsize);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type == SHT_NOBITS) continue;
    size = larger(size, sections[i].sh_offset + sections[i].sh_size);
  }
  return size;
}

static size_t image_size(const void* image) {
  if (!memcmp(image, ELFMAG, SELFMAG)) return elf_size(image);
  const FatBinary* fat = image;
  if (fat->magic == FAT_BINARY) return fat->header_size + fat->size;
  return strlen(image) + 1;
}

// A cubin is refused as a driver does it: no cubin, of another architecture, of a newer CUDA.
static CUresult why_not(const void* image) {
  const Elf64_Ehdr* header = image;
  if (memcmp(image, ELFMAG, SELFMAG)) {
    bool text = strstr(image, ".version") != NULL;
    return text || *(const uint32_t*)image == FAT_BINARY ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
  }
  if (header->e_machine != CUDA_MACHINE) return CUDA_ERROR_INVALID_IMAGE;
  bool newer = header->e_ident[EI_ABIVERSION] >= CUDA_13_ABI;
  if (newer && stub_setting("STUB_DRIVER", 13000) < 13000) return CUDA_ERROR_INVALID_IMAGE;
  unsigned capability = newer ? header->e_flags >> 8 & 0xff : header->e_flags & 0xff;
  if (capability / 10 != (unsigned)stub_setting("STUB_CC", 90) / 10) {
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  }
  return CUDA_SUCCESS;
}

typedef struct {
  void* image;
  size_t size;
  int device;
} Module;

static CUresult load(void** module, const void* image, int device) {
  CUresult refusal = why_not(image);
  if (refusal) return refusal;
  Module* loaded = malloc(sizeof *loaded);
  *loaded = (Module){.size = image_size(image), .device = device};
  loaded->image = malloc(loaded->size);
  memcpy(loaded->image, image, loaded->size);
  *module = loaded;
  return CUDA_SUCCESS;
}

// Modules, and the functions found in them, are kept until the process ends.
static CUresult find(void** function, const Module* module, const char* name) {
  char section[512];
  int length = snprintf(section, sizeof section, ".text.%s", name) + 1;
  bool cubin = !memcmp(module->image, ELFMAG, SELFMAG);
  if (cubin && !memmem(module->image, module->size, section, (size_t)length)) {
    return CUDA_ERROR_NOT_FOUND;
  }
  StubKernel* kernel = malloc(sizeof *kernel);
  *kernel = (StubKernel){strdup(name), module->image, module->size, module->device};
  *function = kernel;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return load((void**)module, image, stub_current_device());
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count,
                            CUjit_option* options, void** values) {
  return cuModuleLoadData(module, image);
}

CUresult cuModuleLoad(CUmodule* module, const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  fseek(file, 0, SEEK_END);
  size_t size = (size_t)ftell(file);
  rewind(file);
  char* image = calloc(1, size + 1);
  size = fread(image, 1, size, file);
  fclose(file);
  CUresult result =
      size < sizeof(Elf64_Ehdr) ? CUDA_ERROR_INVALID_IMAGE : cuModuleLoadData(module, image);
  free(image);
  return result;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return find((void**)function, (Module*)module, name);
}

// A library's kernels serve every device.
CUresult cuLibraryLoadData(CUlibrary* library, const void* image, CUjit_option* options,
                           void** values, unsigned count, CUlibraryOption* library_options,
                           void** library_values, unsigned library_count) {
  return load((void**)library, image, -1);
}

CUresult cuLibraryUnload(CUlibrary library) { return CUDA_SUCCESS; }

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  return find((void**)kernel, (Module*)library, name);
}

CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 32
           : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                              : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function,
                                      const CUlaunchConfig* launch) {
  *count = 1;
  return CUDA_SUCCESS;
}

// ---- what nvcc registers ----

typedef struct {
  int magic, version;
  const FatBinary* data;
  void* unused;
} FatBinaryWrapper;

typedef struct {
  const void* host_function;  // by which the runtime's callers name a kernel
  StubKernel kernel;
} Registered;

static Registered* registered;
static size_t registered_count, registered_room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void** __cudaRegisterFatBinary(void* wrapper) { return (void**)wrapper; }
void __cudaRegisterFatBinaryEnd(void** handle) {}
void __cudaUnregisterFatBinary(void** handle) {}

void __cudaRegisterFunction(void** handle, const char* host_function, char* device_function,
                            const char* name, int threads, uint3* a, uint3* b, dim3* c, dim3* d,
                            int* e) {
  const FatBinary* fat = ((FatBinaryWrapper*)handle)->data;
  pthread_mutex_lock(&lock);
  if (registered_count == registered_room) {
    registered_room = registered_room ? 2 * registered_room : 1024;
    registered = realloc(registered, registered_room * sizeof *registered);
  }
  StubKernel kernel = {name, fat, fat->header_size + fat->size, -1};
  registered[registered_count++] = (Registered){host_function, kernel};
  pthread_mutex_unlock(&lock);
}

void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int external,
                       size_t size, int constant, int global) {}

// PyTorch registers tens of thousands; they are searched only where a hook asks.
StubKernel stub_registered_kernel(const void* host_function) {
  StubKernel found = {"an unknown kernel", NULL, 0, -1};
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < registered_count; ++i) {
    if (registered[i].host_function == host_function) found = registered[i].kernel;
  }
  pthread_mutex_unlock(&lock);
  return found;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
  *kernel = (cudaKernel_t)host_function;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* function) {
  int capability = (int)stub_setting("STUB_CC", 90);
  *attributes = (struct cudaFuncAttributes){.numRegs = 32,
                                            .maxThreadsPerBlock = 1024,
                                            .ptxVersion = capability,
                                            .binaryVersion = capability};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, enum cudaFuncAttribute which, int value) {
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void* function,
                                                                   int threads, size_t shared,
                                                                   unsigned flags) {
  *count = 8;
  return cudaSuccess;
}
