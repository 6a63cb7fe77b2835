// Stand-alone check of the CPU kernels for boxes, without torch, for sanitizers: the error of atan,
// decoded boxes, and both losses and their gradient against plain double arithmetic, in buffers
// that end where the data ends. Exits with 1 if anything fails.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "box_decode.h"
#include "boxes.h"
#include "convert.h"

namespace {

using namespace dflkern;

int passed = 0, failed = 0;

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failed);
  if (!condition) std::printf("FAILED %s\n", what.c_str());
}

void check_arctangent() {
  double worst = 0;
  bool odd = true;
  for (uint64_t bits = 0; bits <= 0x7f800000; bits += 97) {
    const float x = bits_as<float>(static_cast<uint32_t>(bits));
    const double exact = std::atan(double{x});
    int exponent;
    std::frexp(exact, &exponent);
    const double unit = std::ldexp(1.0, std::max(exponent - 24, -149));
    worst = std::max(worst, std::fabs(arctangent(x) - exact) / unit);
    odd = odd && arctangent(-x) == -arctangent(x);
  }
  std::printf("%-28s %.3f ulp (bound 2.5)\n", "atan float", worst);
  expect(odd && worst <= 2.5, "atan float");
  expect(std::isnan(arctangent(std::nanf(""))), "atan of NaN");
}

struct Side {
  double loss, expected;
  std::vector<double> p, y;
};

Side side_of(const std::vector<double>& z, double target, double margin) {
  const int bins = static_cast<int>(z.size());
  Side side{0, 0, z, std::vector<double>(bins, 0)};
  const double max = *std::max_element(z.begin(), z.end());
  double sum = 0;
  for (double& p : side.p) sum += p = std::exp(p - max);
  target = std::min(std::max(target, 0.0), bins - 1 - margin);
  const int left = std::min(static_cast<int>(target), bins - 2);
  side.y[left] = 1 - (target - left);
  side.y[left + 1] = target - left;
  for (int k = 0; k < bins; ++k) {
    side.p[k] /= sum;
    side.expected += k * side.p[k];
    side.loss -= side.y[k] * (z[k] - max - std::log(sum));
  }
  return side;
}

template <Iou kKind, class T>
void check_loss(Storage storage, int bins, int64_t batch, int64_t anchors, bool rows) {
  using F = Compute<T>;
  std::mt19937 random(bins + 7 * anchors);
  std::uniform_real_distribution<double> uniform(0, 1);
  const int64_t count = batch * anchors;
  // Arrays of exactly the size, so that a sanitizer sees a step beyond the end
  const std::unique_ptr<T[]> logits(new T[count * kSides * bins]);
  const std::unique_ptr<T[]> gradient(new T[count * kSides * bins]());
  const std::unique_ptr<F[]> points(new F[2 * anchors]), boxes(new F[count * kSides]);
  const std::unique_ptr<float[]> weight(new float[count]);
  const std::unique_ptr<uint8_t[]> mask(new uint8_t[count]);
  for (int64_t i = 0; i < count * kSides * bins; ++i) {
    narrow(static_cast<F>(uniform(random) * 6), logits[i]);
  }
  for (int64_t i = 0; i < 2 * anchors; ++i) points[i] = static_cast<F>(uniform(random) * 20);
  for (int64_t i = 0; i < count; ++i) {
    // Any byte but 0 means foreground
    mask[i] = uniform(random) < 0.5 ? static_cast<uint8_t>(1 + i % 255) : 0;
    weight[i] = i % 5 ? static_cast<float>(uniform(random)) : 0;
    for (int s = 0; s < kSides; ++s) {
      const F reach = static_cast<F>(uniform(random) * (bins + 1));
      const F point = points[2 * (i % anchors) + s % 2];
      boxes[kSides * i + s] = s < 2 ? point - reach : point + reach;
    }
  }
  BoxLoss loss{};
  loss.call.storage = storage;
  loss.call.logits = logits.get();
  loss.call.gradient = gradient.get();
  loss.call.margin = 0.01;
  loss.call.bins = bins;
  loss.call.bin_stride = loss.call.gradient_bin_stride = rows ? 1 : anchors;
  loss.batch = batch;
  loss.anchors = anchors;
  loss.logits = {anchors * kSides * bins, rows ? kSides * bins : 1, rows ? bins : bins * anchors};
  loss.gradient = loss.logits;
  loss.points = points.get();
  loss.target_boxes = boxes.get();
  loss.weight = {Storage::kFloat, weight.get(), 1, anchors, 1, 0};
  loss.foreground = mask.get();
  loss.foreground_batch_stride = anchors;
  loss.foreground_anchor_stride = 1;
  loss.iou = kKind;
  const std::vector<int64_t> candidates = find_candidates(loss);
  set_candidates(loss, candidates.data(), candidates.size());
  const std::unique_ptr<F[]> kept(new F[kKept * candidates.size()]);
  loss.keep = kept.get();
  std::vector<BoxSums> sums(loss.chunks);
  sum_box_losses(loss, 0, loss.chunks, sums.data());
  const BoxGradients upstream{0.7, 1.3};
  loss.keep = nullptr;
  if (anchors % 2) {  // either way the gradient is the same
    loss.kept = kept.get();
    loss.target_boxes = loss.weight.data = nullptr;
  }
  if (gradient_in_order(loss)) {  // all of it is written
    std::fill(gradient.get(), gradient.get() + count * kSides * bins, logits[0]);
  }
  write_box_gradients(loss, upstream, 0, count / 3);
  write_box_gradients(loss, upstream, count / 3, count);

  double iou_loss = 0, dfl_loss = 0, worst = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t anchor = i % anchors;
    const int64_t first = i / anchors * loss.logits.batch + anchor * loss.logits.anchor;
    const bool active = mask[i] && weight[i] != 0;
    Side sides[kSides];
    for (int s = 0; s < kSides; ++s) {
      std::vector<double> z;
      for (int k = 0; k < bins; ++k) {
        z.push_back(widened(logits[first + s * loss.logits.side + k * loss.call.bin_stride]));
      }
      const F point = points[2 * anchor + s % 2], edge = boxes[kSides * i + s];
      sides[s] = side_of(z, s < 2 ? point - edge : edge - point, 0.01);
    }
    const double x = points[2 * anchor], y = points[2 * anchor + 1];
    const F* b = boxes.get() + kSides * i;
    const Box<double> wanted{b[0], b[1], b[2], b[3]};
    const Box<double> found{x - sides[0].expected, y - sides[1].expected, x + sides[2].expected,
                            y + sides[3].expected};
    const Box<double> g = paired_iou_gradient<kKind>(found, wanted);
    const double by_side[] = {-g.x1, -g.y1, g.x2, g.y2};
    if (active) iou_loss += weight[i] * (1 - paired_iou<kKind>(found, wanted));
    for (int s = 0; s < kSides; ++s) {
      if (active) dfl_loss += weight[i] * sides[s].loss / kSides;
      for (int k = 0; k < bins; ++k) {
        const double p = sides[s].p[k];
        const double exact =
            active ? weight[i] * (upstream.dfl / kSides * (p - sides[s].y[k]) -
                                  upstream.iou * by_side[s] * p * (k - sides[s].expected))
                   : 0;
        const int64_t at = first + s * loss.logits.side + k * loss.call.bin_stride;
        worst = std::max(worst, std::fabs(widened(gradient[at]) - exact));
      }
    }
  }
  BoxSums total;
  for (const BoxSums& part : sums) {
    total.iou += part.iou;
    total.dfl += part.dfl;
  }
  const double rounding = sizeof(T) == 2 ? (storage == Storage::kHalf ? 1e-3 : 8e-3) : 0;
  const double close = sizeof(F) == 4 ? 2e-5 : 1e-12;
  expect(std::fabs(total.iou - iou_loss) <= close * (1 + count) &&
             std::fabs(total.dfl - dfl_loss) <= close * (1 + count) &&
             worst <= close * bins + rounding,
         "kind " + std::to_string(static_cast<int>(kKind)) + ", storage " +
             std::to_string(static_cast<int>(storage)) + ", bins " + std::to_string(bins) +
             ", anchors " + std::to_string(anchors) + (rows ? ", rows" : ", columns"));
}

template <class T>
void check_decode(Storage storage, int bins, int64_t anchors, bool rows, bool cxcywh) {
  using F = Compute<T>;
  constexpr int64_t kBatch = 2;
  std::mt19937 random(bins + 11 * anchors);
  std::uniform_real_distribution<double> uniform(0, 1);
  const int64_t count = kBatch * anchors * kSides;
  const std::unique_ptr<T[]> logits(new T[count * bins]);
  const std::unique_ptr<F[]> points(new F[2 * anchors]), stride(new F[anchors]);
  const std::unique_ptr<F[]> boxes(new F[count]);
  for (int64_t i = 0; i < count * bins; ++i) {
    narrow(static_cast<F>(uniform(random) * 6), logits[i]);
  }
  for (int64_t i = 0; i < 2 * anchors; ++i) points[i] = static_cast<F>(uniform(random) * 20);
  for (int64_t i = 0; i < anchors; ++i) stride[i] = static_cast<F>(8 + i % 3);

  const BoxLayout layout{kBatch, anchors, rows};
  const BoxDecode decode{points.get(), stride.get(), cxcywh, anchors, rows};
  Call call{};
  call.storage = storage;
  call.logits = logits.get();
  call.bins = bins;
  call.bin_stride = rows ? 1 : anchors;
  call.position = true;
  call.position_out = boxes.get();
  call.boxes = &decode;
  const Axis images{kBatch, anchors * kSides * bins, anchors * kSides, 0};
  const Axis sides{kSides, rows ? bins : bins * anchors, layout.side_step(), 0};
  const Axis along{anchors, rows ? kSides * bins : 1, layout.anchor_step(), 0};
  call.axes = 3;
  call.axis[0] = images;
  call.axis[1] = rows ? along : sides;
  call.axis[2] = rows ? sides : along;
  plan(call);
  run(call, 0, call.lines * call.blocks_per_line);
  if (!gives_boxes(call)) {
    to_boxes(layout, points.get(), stride.get(), cxcywh, 0, kBatch * anchors, boxes.get());
  }

  double worst = 0;
  for (int64_t i = 0; i < kBatch * anchors; ++i) {
    const int64_t image = i / anchors, anchor = i % anchors;
    double d[kSides];
    for (int s = 0; s < kSides; ++s) {
      std::vector<double> z;
      const int64_t first = image * images.logits + anchor * along.logits + s * sides.logits;
      for (int k = 0; k < bins; ++k) z.push_back(widened(logits[first + k * call.bin_stride]));
      d[s] = side_of(z, 0, 0).expected;
    }
    const double x = points[2 * anchor], y = points[2 * anchor + 1];
    double box[kSides] = {x - d[0], y - d[1], x + d[2], y + d[3]};
    if (cxcywh) {
      for (int a = 0; a < 2; ++a) {
        const double low = box[a], high = box[a + 2];
        box[a] = (low + high) / 2;
        box[a + 2] = high - low;
      }
    }
    const F* at = boxes.get() + image * images.output + anchor * along.output;
    for (int s = 0; s < kSides; ++s) {
      worst = std::max(worst, std::fabs(at[s * sides.output] - box[s] * stride[anchor]));
    }
  }
  expect(worst <= (sizeof(F) == 4 ? 5e-5 : 1e-11) * bins,
         "decode, storage " + std::to_string(static_cast<int>(storage)) + ", bins " +
             std::to_string(bins) + ", anchors " + std::to_string(anchors) +
             (rows ? ", rows" : ", columns") + (cxcywh ? ", cxcywh" : ", xyxy"));
}

void check_zeros() {
  constexpr int64_t kLarge = (int64_t{1} << 22) + 1000;
  for (const int64_t size : {int64_t{1000}, kLarge}) {
    const std::unique_ptr<char[]> data(new char[size]);
    for (const int64_t begin : {0, 1, 63, 64, 700}) {
      for (const int64_t end : {begin, begin + 1, begin + 100, size}) {
        std::fill(data.get(), data.get() + size, 1);
        fill_zeros(data.get(), size, begin, end);
        const auto zeros = std::count(data.get(), data.get() + size, 0);
        const auto within = std::count(data.get() + begin, data.get() + end, 0);
        expect(zeros == end - begin && within == zeros,
               "zeros from " + std::to_string(begin) + " to " + std::to_string(end));
      }
    }
  }
}

template <class T>
void check_decodes(Storage storage) {
  for (const int bins : {2, 8, 16, 17, 91}) {
    for (const int64_t anchors : {1, 7, 16, 33, 130}) {
      for (const bool rows : {true, false}) {
        check_decode<T>(storage, bins, anchors, rows, false);
        check_decode<T>(storage, bins, anchors, rows, true);
      }
    }
  }
}

template <class T>
void check_losses(Storage storage) {
  for (const int bins : {2, 8, 16, 17, 33, 91, 256}) {
    for (const int64_t anchors : {1, 7, 16, 33}) {
      for (const bool rows : {true, false}) {
        check_loss<Iou::kIou, T>(storage, bins, 2, anchors, rows);
        check_loss<Iou::kGiou, T>(storage, bins, 2, anchors, rows);
        check_loss<Iou::kDiou, T>(storage, bins, 2, anchors, rows);
        check_loss<Iou::kCiou, T>(storage, bins, 2, anchors, rows);
      }
    }
  }
}

}  // namespace

int main() {
  check_arctangent();
  check_losses<float>(Storage::kFloat);
  check_losses<double>(Storage::kDouble);
  check_losses<Half>(Storage::kHalf);
  check_losses<BFloat16>(Storage::kBFloat16);
  check_decodes<float>(Storage::kFloat);
  check_decodes<double>(Storage::kDouble);
  check_decodes<Half>(Storage::kHalf);
  check_decodes<BFloat16>(Storage::kBFloat16);
  check_zeros();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
