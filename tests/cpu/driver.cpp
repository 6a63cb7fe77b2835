// Stand-alone check of the CPU kernels, without torch, for sanitizers: the error of exp and log in
// units in the last place, and every operation, type and layout against plain double arithmetic, in
// buffers that end where the data ends. Exits with 1 if anything fails.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "call.h"
#include "convert.h"

namespace {

using namespace dflkern;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

int passed = 0, failed = 0;

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failed);
  if (!condition) std::printf("FAILED %s\n", what.c_str());
}

// ---- exp and log ------------------------------------------------------------------------------

template <class F>
double ulps(F value, long double exact) {
  int exponent;
  std::frexp(exact, &exponent);
  const int digits = std::numeric_limits<F>::digits;
  return static_cast<double>(std::fabs(value - exact) / std::ldexp(1.0L, exponent - digits));
}

// The largest error over floats with bit patterns first to last; scalars must agree with vectors.
template <class Function>
double worst_float(uint32_t first, uint32_t last, uint32_t step, bool negative, Function function,
                   double (*exact)(double)) {
  double worst = 0;
  constexpr int kWidth = sizeof(VecF) / sizeof(float);
  for (uint64_t base = first; base <= last; base += uint64_t{kWidth} * step) {
    VecF x;
    for (int i = 0; i < kWidth; ++i) {
      const auto bits = static_cast<uint32_t>(std::min<uint64_t>(base + uint64_t(i) * step, last));
      x[i] = negative ? -bits_as<float>(bits) : bits_as<float>(bits);
    }
    const VecF y = function(x);
    for (int i = 0; i < kWidth; ++i) {
      const double truth = exact(double{x[i]});
      worst = std::max(worst, truth == 0 ? std::fabs(y[i]) / 0x1p-149 : ulps<float>(y[i], truth));
    }
    if (bits_as<uint32_t>(function(float(x[0]))) != bits_as<uint32_t>(float(y[0]))) return kInf;
  }
  return worst;
}

template <class Function>
double worst_double(double from, double to, Function function, long double (*exact)(long double)) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform(0, 1);
  double worst = 0;
  for (int i = 0; i < 500000; ++i) {
    const double u = uniform(random), x = from + (to - from) * u * u * u;
    const VecD y = function(splat<VecD>(x));
    const long double truth = exact(x);
    worst = std::max(worst, truth == 0 ? std::fabs(y[0]) : ulps<double>(y[0], truth));
    if (bits_as<uint64_t>(function(x)) != bits_as<uint64_t>(double(y[0]))) return kInf;
  }
  return worst;
}

void expect_ulps(const char* what, double worst, double bound) {
  std::printf("%-28s %.3f ulp (bound %.1f)\n", what, worst, bound);
  expect(worst <= bound, what);
}

void check_functions(uint32_t step) {
  const auto exps = [](auto x) { return exp_nonpositive(x); };
  const auto logs = [](auto x) { return log_at_least_one(x); };
  const auto bits = [](float x) { return bits_as<uint32_t>(x); };
  expect_ulps("exp float, -16 to 0", worst_float(0, bits(16.0f), step, true, exps, std::exp), 2.5);
  expect_ulps("exp float, normal results",
              worst_float(bits(16.0f), bits(87.3365f), step, true, exps, std::exp), 5);
  expect_ulps("log float, 1 to 256",
              worst_float(bits(1.0f), bits(256.0f), step, false, logs, std::log), 1);
  expect_ulps("exp double", worst_double(0, -708.39, exps, std::exp), 1);
  expect_ulps("log double", worst_double(1, 256, logs, std::log), 1);
  for (const float x : {-88.03f, -89.0f, -1e10f, -3.4e38f, -float(kInf)}) {
    expect(exp_nonpositive(x) == 0, "exp of very negative numbers");
    expect(exp_nonpositive(splat<VecF>(x))[0] == 0, "exp of very negative numbers, vector");
  }
  for (const uint32_t nan : {0x7fc00000u, 0xffc00000u, 0x7fffffffu, 0xffffffffu, 0x7fc00001u}) {
    const float x = bits_as<float>(nan);
    expect(std::isnan(exp_nonpositive(splat<VecF>(x))[0]), "exp of NaN");
    expect(std::isnan(log_at_least_one(splat<VecF>(x))[0]), "log of NaN");
    expect(std::isnan(exp_nonpositive(x)) && std::isnan(log_at_least_one(x)), "scalar NaN");
  }
  expect(exp_nonpositive(0.0f) == 1 && exp_nonpositive(0.0) == 1, "exp(0) is 1");
  expect(log_at_least_one(1.0f) == 0 && log_at_least_one(1.0) == 0, "log(1) is 0");
}

// ---- operations -------------------------------------------------------------------------------

struct Exact {
  double loss, position;
  std::vector<double> gradient;
};

// One distribution by the formulas, in double.
Exact exact(const std::vector<double>& z, double t, const std::vector<double>& w, double highest,
            double grad_loss, double grad_position, bool loss, bool position) {
  const int bins = static_cast<int>(z.size());
  double max = -kInf;
  for (double v : z) max = v > max || std::isnan(v) ? v : max;
  double sum = 0, moment = 0;
  std::vector<double> p(bins);
  for (int k = 0; k < bins; ++k) sum += p[k] = std::exp(z[k] - max);
  for (int k = 0; k < bins; ++k) moment += (p[k] /= sum) * w[k];
  t = t < w[0] ? w[0] : t;
  t = t > highest ? highest : t;
  int left = 0;
  while (left < bins - 2 && w[left + 1] <= t) ++left;
  const double right_weight = (t - w[left]) / (w[left + 1] - w[left]);
  const double weights[2] = {1 - right_weight, right_weight};
  Exact result{std::log(sum), moment, std::vector<double>(bins)};
  for (int i = 0; i < 2; ++i) {
    if (weights[i] != 0) result.loss -= weights[i] * (z[left + i] - max);
  }
  for (int k = 0; k < bins; ++k) {
    const double y = k == left ? weights[0] : k == left + 1 ? weights[1] : weights[1] * 0;
    if (loss) result.gradient[k] += grad_loss * (p[k] - y);
    if (position) result.gradient[k] += grad_position * p[k] * (w[k] - moment);
  }
  return result;
}

bool close(double value, double truth, double tolerance) {
  if (std::isnan(truth)) return std::isnan(value);
  if (std::isinf(truth)) return value == truth;
  return std::fabs(value - truth) <= tolerance;
}

// Logits of n distributions: bin k of distribution i at i * stride + k * bin_stride.
struct Layout {
  const char* name;
  int64_t stride, bin_stride;
};

template <class T>
class Case {
  using F = Compute<T>;

 public:
  Case(Storage storage, int bins, int n, Layout layout, bool uniform)
      : storage_(storage), bins_(bins), n_(n), layout_(layout), random_(bins * 1000 + n) {
    const int64_t size = n ? (n - 1) * layout.stride + (bins - 1) * layout.bin_stride + 1 : 0;
    logits_.resize(size);
    std::normal_distribution<float> normal(0, 3);
    for (T& logit : logits_) narrow(F(normal(random_)), logit);
    for (int i = 0; i < n; ++i) {
      targets_.push_back(F(std::uniform_real_distribution<float>(-1, bins)(random_)));
      grads_.push_back(F(normal(random_)));
    }
    poison();
    for (int k = 0; k < bins; ++k) positions_.push_back(uniform ? F(k) : F(k * k) / 4 - 1);
    uniform_ = uniform;
  }

  void check(bool loss, bool position) {
    const std::string what = std::string(layout_.name) + ", storage " +
                             std::to_string(static_cast<int>(storage_)) + ", bins " +
                             std::to_string(bins_) + ", n " + std::to_string(n_) + ", " +
                             (loss ? position ? "both" : "loss" : "position");
    Call call{};
    call.storage = storage_;
    call.loss = loss;
    call.position = position;
    call.logits = logits_.data();
    call.project = uniform_ ? nullptr : positions_.data();
    call.margin = 0.01;
    call.bins = bins_;
    call.bin_stride = layout_.bin_stride;
    call.axes = 1;
    call.axis[0] = {n_, layout_.stride, 1, layout_.stride};
    if (loss) call.target = {targets_.data(), 1};
    Call back = call;
    std::vector<F> losses(n_), found(n_);
    if (loss) call.loss_out = losses.data();
    if (position) call.position_out = found.data();
    plan(call);
    run(call, 0, call.lines * call.blocks_per_line);
    std::vector<T> gradient(logits_.size());
    back.backward = true;
    back.gradient = gradient.data();
    back.gradient_bin_stride = layout_.bin_stride;
    if (loss) back.grad_loss = {grads_.data(), 1};
    if (position) back.grad_position = {grads_.data(), 1};
    plan(back);
    run(back, 0, back.lines * back.blocks_per_line);
    bool good = true;
    for (int i = 0; i < n_; ++i) {
      good = good && agrees(i, losses[i], found[i], gradient, loss, position);
    }
    expect(good, what);
  }

 private:
  // Puts special values where they hurt.
  void poison() {
    const double values[] = {kNan, kInf, -kInf, 1e30, -1e30, 200, -200};
    for (int i = 0; i < n_; i += 3) {
      const int k = (i / 3) % bins_;
      narrow(F(values[i / 3 % 7]), logits_[i * layout_.stride + k * layout_.bin_stride]);
    }
    const double targets[] = {kNan, kInf, -kInf, 0, 1, double(bins_ - 1), 1e30};
    for (int i = 1; i < n_; i += 3) targets_[i] = F(targets[i / 3 % 7]);
    for (int i = 2; i < n_; i += 21) {
      for (int k = 0; k < bins_; ++k) {
        narrow(F(-kInf), logits_[i * layout_.stride + k * layout_.bin_stride]);
      }
    }
  }

  bool agrees(int i, double loss_found, double position_found, const std::vector<T>& gradient,
              bool loss, bool position) const {
    std::vector<double> z, w(positions_.begin(), positions_.end());
    const int64_t at = i * layout_.stride;
    for (int k = 0; k < bins_; ++k) z.push_back(widened(logits_[at + k * layout_.bin_stride]));
    // The bound of the clamp is rounded as the kernels round it: 1e30 magnifies the difference.
    const F highest =
        uniform_ ? F(bins_ - 1 - 0.01) : std::max(positions_.back() - F(0.01), positions_[0]);
    const Exact truth = exact(z, targets_[i], w, highest, grads_[i], grads_[i], loss, position);
    const double eps = std::numeric_limits<F>::epsilon() * 8, width = w.back() - w[0] + 1;
    const double size = 30 + std::fabs(truth.loss);
    bool good = (!loss || close(loss_found, truth.loss, eps * width * size)) &&
                (!position || close(position_found, truth.position, eps * width));
    const double step = sizeof(T) == 2 ? (storage_ == Storage::kHalf ? 0x1p-10 : 0x1p-7) : 0;
    for (int k = 0; k < bins_; ++k) {
      const double g = truth.gradient[k];
      const double scale = (1 + std::fabs(grads_[i])) * width;
      good = good && close(widened(gradient[at + k * layout_.bin_stride]), g,
                           eps * scale * width + step * std::fabs(g) + (step != 0) * 0x1p-24);
    }
    return good;
  }

  Storage storage_;
  int bins_, n_;
  Layout layout_;
  bool uniform_;
  std::mt19937 random_;
  std::vector<T> logits_;
  std::vector<F> targets_, grads_, positions_;
};

template <class T>
void check_operations(Storage storage) {
  for (const int bins : {2, 3, 7, 8, 9, 10, 11, 16, 17, 19, 22, 33, 91, 256}) {
    for (const int n : {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130}) {
      const int64_t columns = std::max(n, 1);
      for (const Layout layout :
           {Layout{"rows", bins, 1}, Layout{"padded rows", bins + 3, 1},
            Layout{"columns", 1, columns}, Layout{"padded columns", 1, columns + 5},
            Layout{"strided", 2 * bins, 2}}) {
        for (const bool uniform : {true, false}) {
          Case<T> it(storage, bins, n, layout, uniform);
          it.check(true, false);
          it.check(false, true);
          it.check(true, true);
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char**) {
  check_functions(argc > 1 ? 1 : 61);  // any argument: every float
  check_operations<float>(Storage::kFloat);
  check_operations<double>(Storage::kDouble);
  check_operations<Half>(Storage::kHalf);
  check_operations<BFloat16>(Storage::kBFloat16);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
