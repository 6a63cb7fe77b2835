// The logits whose class is that of their anchor's object.

#include "class_parts.h"

namespace dflkern {
namespace {

double score_of(const AnchorScores& scores, int64_t image, int64_t anchor) {
  double found = 0;
  with_storage(scores.storage, [&](auto type) {
    using T = decltype(type);
    found = widened(static_cast<const T*>(
        scores.data)[image * scores.batch_stride + anchor * scores.anchor_stride]);
  });
  return found;
}

template <class I>
void find_in(const ClassLoss& loss, std::vector<Positive>& found) {
  const I objects = static_cast<I>(std::min<int64_t>(loss.objects, std::numeric_limits<I>::max()));
  for (int64_t image = 0; image < loss.batch; ++image) {
    const I* matched = static_cast<const I*>(loss.matched.data) + image * loss.matched.batch_stride;
    for (int64_t anchor = 0; anchor < loss.anchors; ++anchor) {
      const I object = matched[anchor * loss.matched.anchor_stride];
      if (object < 0 || object >= objects) continue;
      const int64_t label = loss.labels[object];
      if (label < 0 || label >= loss.classes) continue;
      double score = score_of(loss.score, image, anchor);
      if (loss.storage != Storage::kDouble) score = static_cast<float>(score);
      found.push_back({image * loss.anchors + anchor, label, score});
    }
  }
}

}  // namespace

PositiveLoss positive_loss(double z, double y, bool varifocal, bool quality, double gamma,
                           bool detach_modulation) {
  const double e = std::exp(-std::fabs(z)), log = std::log1p(e);
  const double p = z > 0 ? 1 / (1 + e) : e / (1 + e), rest = z > 0 ? e / (1 + e) : 1 / (1 + e);
  const double entropy = product(y, (z < 0    ? -z
                                     : z == z ? 0
                                              : z) +
                                        log) +
                         product(1 - y, (z > 0    ? z
                                         : z == z ? 0
                                                  : z) +
                                            log);
  const double away = p - y;
  if (varifocal) return {product(y, entropy), y * away};
  if (!quality) return {entropy, away};
  const double factor = std::pow(std::fabs(away), gamma);
  PositiveLoss result{product(factor, entropy), factor * away};
  if (!detach_modulation && away != 0) {
    const double slope = gamma * std::pow(std::fabs(away), gamma - 1) * (p * rest);
    result.gradient += product(away < 0 ? -slope : slope, entropy);
  }
  return result;
}

std::vector<Positive> find_positives(const ClassLoss& loss) {
  std::vector<Positive> found;
  if (loss.matched.wide) {
    find_in<int64_t>(loss, found);
  } else {
    find_in<int32_t>(loss, found);
  }
  return found;
}

int64_t class_loss_parts(const ClassLoss& loss) {
  const int64_t size = part_anchors(loss);
  return loss.classes ? loss.batch * ((loss.anchors + size - 1) / size) : 0;
}

int64_t class_loss_part_size(const ClassLoss& loss) {
  return std::min(part_anchors(loss), loss.anchors) * loss.classes;
}

}  // namespace dflkern
