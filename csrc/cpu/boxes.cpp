#include "boxes.h"

#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "box_chunk.h"
#include "storage.h"

namespace dflkern {
namespace {

// Calls function(anchor, offset of its first number) for anchors, of all images, begin to end.
template <class Function>
void each_anchor(const BoxLayout& layout, int64_t begin, int64_t end, Function function) {
  int64_t image = begin / layout.anchors, anchor = begin % layout.anchors;
  for (int64_t index = begin; index < end; ++index, ++anchor) {
    if (anchor == layout.anchors) {
      anchor = 0;
      ++image;
    }
    function(anchor, image * layout.anchors * kSides + anchor * layout.anchor_step());
  }
}

// The anchors of one image whose mask byte is not 0; most masks are mostly empty. A bool tensor may
// hold any byte, for example as a view of uint8, so each counts as set once, whatever its bits.
void list_set(const uint8_t* mask, int64_t stride, int64_t anchors, int64_t first,
              std::vector<int64_t>& found) {
  constexpr int kEight = 8;
  int64_t a = 0;
  const bool bytes = stride == 1 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
  for (; bytes && a + 4 * kEight <= anchors; a += 4 * kEight) {
    uint64_t eights[4];
    std::memcpy(eights, mask + a, sizeof(eights));
    if ((eights[0] | eights[1] | eights[2] | eights[3]) == 0) continue;
    for (int e = 0; e < 4; ++e) {
      // Lowest bit of a byte: the OR of its eight bits. The first of eight bytes is the lowest.
      uint64_t left = eights[e] | eights[e] >> 4;
      left |= left >> 2;
      left = (left | left >> 1) & 0x0101010101010101;
      for (; left != 0; left &= left - 1) {
        found.push_back(first + a + e * kEight + __builtin_ctzll(left) / 8);
      }
    }
  }
  for (; a < anchors; ++a) {
    if (mask[a * stride] != 0) found.push_back(first + a);
  }
}

// The anchors of one image that have an object.
template <class I>
void list_matched(const I* matched, int64_t stride, int64_t objects, int64_t anchors, int64_t first,
                  std::vector<int64_t>& found) {
  using Unsigned = std::make_unsigned_t<I>;
  const auto limit =
      static_cast<Unsigned>(std::min<int64_t>(objects, std::numeric_limits<I>::max()));
  for (int64_t a = 0; a < anchors; ++a) {
    if (static_cast<Unsigned>(matched[a * stride]) < limit) found.push_back(first + a);
  }
}

}  // namespace

template <class F>
void to_boxes(const BoxLayout& layout, const F* points, const F* stride, bool cxcywh, int64_t begin,
              int64_t end, F* boxes) {
  const int64_t side = layout.side_step();
  each_anchor(layout, begin, end, [=](int64_t anchor, int64_t offset) {
    F* box = boxes + offset;
    const F x = points[2 * anchor], y = points[2 * anchor + 1];
    const F scale = stride ? stride[anchor] : F(1);
    F x1 = x - box[0], y1 = y - box[side], x2 = x + box[2 * side], y2 = y + box[3 * side];
    if (cxcywh) {
      const F width = x2 - x1, height = y2 - y1;
      x1 = (x1 + x2) / 2;
      y1 = (y1 + y2) / 2;
      x2 = width;
      y2 = height;
    }
    box[0] = x1 * scale;
    box[side] = y1 * scale;
    box[2 * side] = x2 * scale;
    box[3 * side] = y2 * scale;
  });
}

template <class F>
void to_distance_gradients(const BoxLayout& layout, const F* stride, bool cxcywh, int64_t begin,
                           int64_t end, const F* grad_boxes, F* grad_distances) {
  const int64_t side = layout.side_step();
  each_anchor(layout, begin, end, [=](int64_t anchor, int64_t offset) {
    const F* from = grad_boxes + offset;
    F* to = grad_distances + offset;
    const F scale = stride ? stride[anchor] : F(1);
    for (int axis = 0; axis < 2; ++axis) {
      const F first = from[axis * side] * scale, second = from[(axis + 2) * side] * scale;
      // Centre = anchor + (rb - lt) / 2, size = lt + rb
      to[axis * side] = cxcywh ? second - first / 2 : -first;
      to[(axis + 2) * side] = cxcywh ? second + first / 2 : second;
    }
  });
}

template void to_boxes<float>(const BoxLayout&, const float*, const float*, bool, int64_t, int64_t,
                              float*);
template void to_boxes<double>(const BoxLayout&, const double*, const double*, bool, int64_t,
                               int64_t, double*);
template void to_distance_gradients<float>(const BoxLayout&, const float*, bool, int64_t, int64_t,
                                           const float*, float*);
template void to_distance_gradients<double>(const BoxLayout&, const double*, bool, int64_t, int64_t,
                                            const double*, double*);

std::vector<int64_t> find_candidates(const BoxLoss& loss) {
  std::vector<int64_t> found;
  for (int64_t image = 0; image < loss.batch; ++image) {
    const int64_t first = image * loss.anchors;
    const MatchedObjects& matched = loss.matched;
    if (matched.data) {
      const int64_t at = image * matched.batch_stride;
      const auto list = [&](const auto* row) {
        list_matched(row + at, matched.anchor_stride, loss.objects, loss.anchors, first, found);
      };
      matched.wide ? list(static_cast<const int64_t*>(matched.data))
                   : list(static_cast<const int32_t*>(matched.data));
      continue;
    }
    if (loss.foreground) {
      list_set(loss.foreground + image * loss.foreground_batch_stride,
               loss.foreground_anchor_stride, loss.anchors, first, found);
      continue;
    }
    for (int64_t a = 0; a < loss.anchors; ++a) {
      if (weight_of<double>(loss.weight, image, a) != 0) found.push_back(first + a);
    }
  }
  return found;
}

void set_candidates(BoxLoss& loss, const int64_t* candidates, int64_t count) {
  loss.candidates = candidates;
  loss.count = count;
  const int lanes = std::clamp(kColumnsSize / loss.call.bins / kStep * kStep, kStep, kMaxLanes);
  loss.chunk = lanes / kSides;
  loss.chunks = (count + loss.chunk - 1) / loss.chunk;
}

void sum_box_losses(const BoxLoss& loss, int64_t begin, int64_t end, BoxSums* sums) {
  with_storage(loss.call.storage, [&](auto logit) {
    BoxChunk<decltype(logit)> chunk(loss);
    for (int64_t c = begin; c < end; ++c) sums[c] = chunk.sum(c);
  });
}

#if defined(__SSE2__)
// A cache line of zeros, in the fewest stores: a line that one store fills is not put together.
DFL_INLINE void stream_zeros(char* line) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(line), _mm512_setzero_si512());
#elif defined(__AVX__)
  for (int i = 0; i < kCacheLine; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(line + i), _mm256_setzero_si256());
  }
#else
  for (int i = 0; i < kCacheLine; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(line + i), _mm_setzero_si128());
  }
#endif
}
#endif

void fill_zeros(char* data, int64_t size, int64_t begin, int64_t end) {
#if defined(__SSE2__)
  constexpr int64_t kCached = 1 << 22;
  if (size > kCached) {
    const auto aligned = [&](int64_t at) {
      const int64_t over = reinterpret_cast<uintptr_t>(data + at) % kCacheLine;
      return over ? std::min(at + kCacheLine - over, end) : at;
    };
    int64_t at = aligned(begin);
    std::memset(data + begin, 0, at - begin);
    for (; at + kCacheLine <= end; at += kCacheLine) {
      char* line = data + at;
      if (reinterpret_cast<uintptr_t>(line) % kPage == 0) __builtin_prefetch(line + 4 * kPage);
      stream_zeros(line);
    }
    begin = at;
  }
#endif
  std::memset(data + begin, 0, end - begin);
}

void end_fills() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

bool gradient_in_order(const BoxLoss& loss) {
  const int64_t per_anchor = kSides * loss.call.bins;
  const BoxStrides& to = loss.gradient;
  return loss.call.gradient_bin_stride == 1 && to.side == loss.call.bins &&
         to.anchor == per_anchor && to.batch == loss.anchors * per_anchor;
}

void write_box_gradients(const BoxLoss& loss, const BoxGradients& upstream, int64_t begin,
                         int64_t end) {
  const bool in_order = gradient_in_order(loss);
  const int64_t* last = loss.candidates + loss.count;
  int64_t c = std::lower_bound(loss.candidates, last, begin) - loss.candidates;
  const int64_t after = std::lower_bound(loss.candidates, last, end) - loss.candidates;
  with_storage(loss.call.storage, [&](auto logit) {
    using T = decltype(logit);
    const int64_t bytes = kSides * loss.call.bins * static_cast<int64_t>(sizeof(T));
    const int64_t size = loss.batch * loss.anchors * bytes;
    char* data = static_cast<char*>(loss.call.gradient);
    const auto fill_to = [&](int64_t anchor) {
      if (in_order) fill_zeros(data, size, begin * bytes, anchor * bytes);
      begin = anchor + 1;
    };
    if (c < after) {
      BoxChunk<T> chunk(loss);
      for (; c < after; c += loss.chunk) {
        chunk.write_gradient(c, std::min<int64_t>(c + loss.chunk, after), upstream,
                             [&](const int64_t* found, int count) {
                               for (int i = 0; i < count; ++i) fill_to(found[i]);
                             });
      }
    }
    fill_to(end);
    end_fills();
  });
}

}  // namespace dflkern
