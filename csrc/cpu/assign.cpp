#include "assign.h"

#include <algorithm>
#include <vector>

#include "assign_matches.h"
#include "assign_scene.h"
#include "convert.h"

namespace dflkern {
namespace {

template <class V>
Box<V> splat_box(const Box<Element<V>>& box) {
  return {splat<V>(box.x1), splat<V>(box.y1), splat<V>(box.x2), splat<V>(box.y2)};
}

template <Iou kKind, class V>
V overlap_function(const Box<V>& object, const Box<V>& found) {
  return overlap_of<kKind>(object, found);
}

template <class V>
auto overlap_by_kind(Iou kind) {
  switch (kind) {
    case Iou::kIou:
      return overlap_function<Iou::kIou, V>;
    case Iou::kGiou:
      return overlap_function<Iou::kGiou, V>;
    case Iou::kDiou:
      return overlap_function<Iou::kDiou, V>;
    default:
      return overlap_function<Iou::kCiou, V>;
  }
}

// Reads the logits of the lanes whose bits are set.
template <class T>
void gather(const void* logits, int64_t stride, const int32_t* anchors, uint32_t bits,
            Compute<T>* to) {
  for (; bits; bits &= bits - 1) {
    const int i = __builtin_ctz(bits);
    to[i] = widened(static_cast<const T*>(logits)[anchors[i] * stride]);
  }
}

template <class T>
class AssignerOf final : public Assigner {
  using F = Compute<T>;
  using V = Vec<F>;
  static constexpr int kLanes = kLanesOf<V>;

 public:
  explicit AssignerOf(const AssignCall& call)
      : call_(call),
        alpha_(call.alpha),
        beta_(call.beta),
        eps_(static_cast<F>(call.eps)),
        topk_(std::min(call.topk, call.anchors)),
        overlap_(overlap_by_kind<V>(call.iou)),
        scene_(call),
        claims_(new Match<F>[scene_.objects() * topk_]),
        counts_(scene_.objects()),
        sums_(call.batch) {}

  int64_t objects() const override { return scene_.objects(); }

  void claim(int64_t begin, int64_t end) override {
    for (int64_t i = begin; i < end; ++i) claim_for(i);
  }

  void settle(int64_t begin, int64_t end) override {
    Image image;
    for (int64_t i = begin; i < end; ++i) settle_image(i, image);
  }

  double total() const override {
    double sum = 0;
    for (const double of_image : sums_) sum += of_image;
    return sum;
  }

 private:
  // What one image needs, kept from image to image for its memory.
  struct Image {
    std::vector<int32_t> contested;
    std::vector<Match<F>> best, final;
    std::vector<F> largest_metric, largest_overlap;
  };

  const F* boxes_of(int64_t image) const {
    return static_cast<const F*>(call_.boxes) + image * call_.box_strides.batch;
  }
  // The logits of an object's label in its image.
  const void* logits_of(int64_t object) const {
    return static_cast<const T*>(call_.logits) + scene_.images[object] * call_.logit_strides.batch +
           scene_.labels[object] * call_.logit_strides.channel;
  }

  Box<V> load_boxes(const F* boxes, const int32_t* anchors, int count) const {
    alignas(sizeof(V)) F sides[kSides][kLanes];
    const int64_t step = call_.box_strides.channel;
    for (int i = 0; i < kLanes; ++i) {
      const F* box = boxes + anchors[std::min(i, count - 1)] * call_.box_strides.anchor;
      for (int s = 0; s < kSides; ++s) sides[s][i] = box[s * step];
    }
    return {load<V>(sides[0]), load<V>(sides[1]), load<V>(sides[2]), load<V>(sides[3])};
  }

  // sigmoid(logit)^alpha times overlap^beta, where bits are set; NaN counts as 0.
  V metric_of(int64_t object, const int32_t* anchors, uint32_t bits, V overlap_part) const {
    alignas(sizeof(V)) F logits[kLanes] = {};
    gather<T>(logits_of(object), call_.logit_strides.anchor, anchors, bits, logits);
    return larger(alpha_(sigmoid(load<V>(logits))) * overlap_part, V{});
  }

  void claim_for(int64_t object) {
    const Box<V> reach = splat_box<V>(scene_.reaches.at(object));
    const Box<V> box = splat_box<V>(scene_.boxes.at(object));
    Claims<F> claims(claims_.get() + object * topk_, topk_);
    int32_t listed[kAnchorBlock + kLanes];
    int count = 0;
    for (int64_t b = 0; b < scene_.blocks; ++b) {
      if (!scene_.meets(object, b, eps_)) continue;
      for (int64_t a = b * kAnchorBlock; a < (b + 1) * kAnchorBlock; a += kLanes) {
        const auto inside = contains(reach, load<V>(&scene_.x[a]), load<V>(&scene_.y[a]), eps_);
        for (uint32_t bits = lane_bits(inside); bits; bits &= bits - 1) {
          listed[count++] = static_cast<int32_t>(a) + __builtin_ctz(bits);
        }
      }
      int done = 0;
      for (; count - done >= kLanes; done += kLanes) {
        consider(object, box, listed + done, kLanes, claims);
      }
      std::copy(listed + done, listed + count, listed);
      count -= done;
    }
    if (count) consider(object, box, listed, count, claims);
    counts_[object] = claims.count();
  }

  // Offers an object's candidates, in ascending order: of equal ones the first stays.
  void consider(int64_t object, const Box<V>& box, const int32_t* anchors, int count,
                Claims<F>& claims) {
    const V overlap = overlap_(box, load_boxes(boxes_of(scene_.images[object]), anchors, count));
    const V most = beta_(overlap);  // what the metric is at most
    const uint32_t all = static_cast<uint32_t>((uint64_t(1) << count) - 1);
    uint32_t bits = lane_bits(most > claims.floor()) & all;
    if (bits == 0) return;
    const V metric = metric_of(object, anchors, bits, most);
    bits &= lane_bits(metric > claims.floor());
    for (; bits; bits &= bits - 1) {
      const int i = __builtin_ctz(bits);
      if (metric[i] > claims.floor()) {
        claims.add({static_cast<int32_t>(object), anchors[i], metric[i], overlap[i]});
      }
    }
  }

  template <class Function>
  void each_claim(int64_t image, Function function) {
    for (int64_t object = scene_.first[image]; object < scene_.first[image + 1]; ++object) {
      const Match<F>* claims = claims_.get() + object * topk_;
      for (int64_t i = 0; i < counts_[object]; ++i) function(claims[i]);
    }
  }

  // The rival of the largest overlap for an anchor, the first of equal ones.
  Match<F> find_winner(int64_t image, int32_t anchor) const {
    Match<F> best{-1, anchor, 0, -1};
    const Box<V> found = load_boxes(boxes_of(image), &anchor, 1);
    const V x = splat<V>(scene_.x[anchor]), y = splat<V>(scene_.y[anchor]);
    const int64_t end = scene_.first[image + 1];
    for (int64_t object = scene_.first[image]; object < end; object += kLanes) {
      uint32_t bits = ~uint32_t(0) >> (32 - std::min<int64_t>(kLanes, end - object));
      if (call_.conflicts == Conflicts::kInside) {
        bits &= lane_bits(contains(scene_.reaches.template load_at<V>(object), x, y, eps_));
      }
      if (bits == 0) continue;
      const V overlap = overlap_(scene_.boxes.template load_at<V>(object), found);
      for (; bits; bits &= bits - 1) {
        const int i = __builtin_ctz(bits);
        if (overlap[i] > best.overlap) {
          best.object = static_cast<int32_t>(object + i);
          best.overlap = overlap[i];
        }
      }
    }
    return best;
  }

  // Settles which object each claimed anchor goes to, in `final`.
  void resolve(int64_t image, int32_t* matched, Image& of) {
    of.contested.clear();
    of.best.clear();
    of.final.clear();
    // The object that claimed an anchor; of several, -2 minus the place among the contested
    each_claim(image, [&](const Match<F>& claim) {
      int32_t& owner = matched[claim.anchor];
      if (owner >= 0) {
        owner = -2 - static_cast<int32_t>(of.contested.size());
        of.contested.push_back(claim.anchor);
      } else if (owner == -1) {
        owner = claim.object;
      }
    });
    of.best.resize(of.contested.size(), {-1, -1, 0, -1});
    each_claim(image, [&](const Match<F>& claim) {
      const int32_t owner = matched[claim.anchor];
      if (owner >= 0) return of.final.push_back(claim);
      Match<F>& best = of.best[-2 - owner];
      if (claim.overlap > best.overlap) best = claim;
    });
    for (size_t i = 0; i < of.contested.size(); ++i) {
      Match<F> best = of.best[i];
      if (call_.conflicts != Conflicts::kClaimed) {
        best = find_winner(image, of.contested[i]);
        best.metric = metric_of(best.object, &best.anchor, 1, beta_(splat<V>(best.overlap)))[0];
      }
      of.final.push_back(best);
    }
  }

  void settle_image(int64_t image, Image& of) {
    int32_t* matched = call_.matched + image * call_.anchors;
    F* score = static_cast<F*>(call_.score) + image * call_.anchors;
    std::fill(matched, matched + call_.anchors, -1);
    std::fill(score, score + call_.anchors, F(0));
    resolve(image, matched, of);
    each_claim(image, [&](const Match<F>& claim) { matched[claim.anchor] = -1; });
    if (call_.topk2 < call_.topk) keep_best(of.final, call_.topk2);
    const int64_t first = scene_.first[image], count = scene_.first[image + 1] - first;
    of.largest_metric.assign(count, 0);
    of.largest_overlap.assign(count, 0);
    for (const Match<F>& pair : of.final) {
      F& metric = of.largest_metric[pair.object - first];
      F& overlap = of.largest_overlap[pair.object - first];
      metric = std::max(metric, pair.metric);
      overlap = std::max(overlap, pair.overlap);
    }
    double sum = 0;
    for (const Match<F>& pair : of.final) {
      const F scale = of.largest_metric[pair.object - first] + eps_;
      const F most = pair.metric * of.largest_overlap[pair.object - first];
      const F share = pair.metric > 0 ? most / scale : F(0);
      matched[pair.anchor] = scene_.numbers[pair.object];
      score[pair.anchor] = share;
      sum += share;
    }
    sums_[image] = sum;
  }

  const AssignCall& call_;
  const Power<F> alpha_, beta_;
  const F eps_;
  const int64_t topk_;
  V (*const overlap_)(const Box<V>&, const Box<V>&);
  const Scene<F> scene_;
  const std::unique_ptr<Match<F>[]> claims_;  // a row of topk_ for each object
  std::vector<int64_t> counts_;               // of claims in each row
  std::vector<double> sums_;
};

}  // namespace

std::unique_ptr<Assigner> make_assigner(const AssignCall& call) {
  switch (call.storage) {
    case Storage::kFloat:
      return std::make_unique<AssignerOf<float>>(call);
    case Storage::kDouble:
      return std::make_unique<AssignerOf<double>>(call);
    case Storage::kHalf:
      return std::make_unique<AssignerOf<Half>>(call);
    default:
      return std::make_unique<AssignerOf<BFloat16>>(call);
  }
}

}  // namespace dflkern
