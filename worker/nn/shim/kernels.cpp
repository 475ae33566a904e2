// The kernels over contiguous [N, C, L] data.

#include "kernels.h"
#include "packs.h"

namespace lockstep {
namespace LOCKSTEP_ISA {
namespace {

inline double total(Doubles a) { return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])); }

// Two interleaved accumulators hide the latency of the addition.
struct Sum {
  Doubles even = {};
  Doubles odd = {};
  double value() const { return total(even + odd); }
};

template <class T>
void moments(const T* x, Extent e, double* mean, double* m2) {
  const double count = static_cast<double>(e.samples * e.length);
  for (int64_t c = 0; c < e.channels; ++c) {
    Sum sum;
    for (int64_t n = 0; n < e.samples; ++n) {
      const T* row = x + (n * e.channels + c) * e.length;
      int64_t i = 0;
      for (; i + 2 * kLanes <= e.length; i += 2 * kLanes) {
        sum.even += widen(load(row + i));
        sum.odd += widen(load(row + i + kLanes));
      }
      for (int64_t lane = 0; i < e.length; ++i, ++lane) {
        (lane < kLanes ? sum.even : sum.odd)[lane % kLanes] += static_cast<double>(row[i]);
      }
    }
    const double centre = count > 0 ? sum.value() / count : 0.0;
    Sum squares;
    for (int64_t n = 0; n < e.samples; ++n) {
      const T* row = x + (n * e.channels + c) * e.length;
      int64_t i = 0;
      for (; i + 2 * kLanes <= e.length; i += 2 * kLanes) {
        const Doubles a = widen(load(row + i)) - centre;
        const Doubles b = widen(load(row + i + kLanes)) - centre;
        squares.even += a * a;
        squares.odd += b * b;
      }
      for (int64_t lane = 0; i < e.length; ++i, ++lane) {
        const double a = static_cast<double>(row[i]) - centre;
        (lane < kLanes ? squares.even : squares.odd)[lane % kLanes] += a * a;
      }
    }
    mean[c] = centre;
    m2[c] = squares.value();
  }
}

template <class T, bool kRelu>
void normalize_rows(const T* x, T* y, Extent e, Affine<T> affine) {
  const Pack<T> zeros = {};
  for (int64_t n = 0; n < e.samples; ++n) {
    for (int64_t c = 0; c < e.channels; ++c) {
      const T mean = affine.mean[c], scale = affine.scale[c], beta = affine.beta[c];
      const int64_t at = (n * e.channels + c) * e.length;
      const T* from = x + at;
      T* to = y + at;
      int64_t i = 0;
      for (; i + kLanes <= e.length; i += kLanes) {
        const Pack<T> value = (load(from + i) - mean) * scale + beta;
        store(to + i, kRelu ? relu(value, zeros) : value);
      }
      for (; i < e.length; ++i) {
        const T value = (from[i] - mean) * scale + beta;
        to[i] = kRelu ? relu(value, T(0)) : value;
      }
    }
  }
}

template <class T, bool kRelu>
void gradient_sums_rows(
    const T* x, const T* dy, Extent e, Affine<T> affine, const double* means, double* sums, double* sums_centred) {
  const Pack<T> zeros = {};
  for (int64_t c = 0; c < e.channels; ++c) {
    const T mean = affine.mean[c], scale = affine.scale[c], beta = affine.beta[c];
    const double centre = means[c];
    Sum sum, centred;
    for (int64_t n = 0; n < e.samples; ++n) {
      const int64_t at = (n * e.channels + c) * e.length;
      const T* xs = x + at;
      const T* gs = dy + at;
      const auto gradient = [&](int64_t i) {
        const Pack<T> g = load(gs + i);
        return kRelu ? relu_gradient((load(xs + i) - mean) * scale + beta, g, zeros) : g;
      };
      int64_t i = 0;
      for (; i + 2 * kLanes <= e.length; i += 2 * kLanes) {
        const Doubles a = widen(gradient(i));
        const Doubles b = widen(gradient(i + kLanes));
        sum.even += a;
        sum.odd += b;
        centred.even += a * (widen(load(xs + i)) - centre);
        centred.odd += b * (widen(load(xs + i + kLanes)) - centre);
      }
      for (int64_t lane = 0; i < e.length; ++i, ++lane) {
        const T g = kRelu ? relu_gradient((xs[i] - mean) * scale + beta, gs[i], T(0)) : gs[i];
        const double a = static_cast<double>(g);
        (lane < kLanes ? sum.even : sum.odd)[lane % kLanes] += a;
        (lane < kLanes ? centred.even : centred.odd)[lane % kLanes] += a * (static_cast<double>(xs[i]) - centre);
      }
    }
    sums[c] = sum.value();
    sums_centred[c] = centred.value();
  }
}

template <class T, bool kRelu>
void input_gradient_rows(
    const T* x, const T* dy, T* dx, Extent e, Affine<T> affine, const T* slopes, const T* offsets) {
  const Pack<T> zeros = {};
  for (int64_t n = 0; n < e.samples; ++n) {
    for (int64_t c = 0; c < e.channels; ++c) {
      const T mean = affine.mean[c], scale = affine.scale[c], beta = affine.beta[c];
      const T slope = slopes[c], offset = offsets[c];
      const int64_t at = (n * e.channels + c) * e.length;
      const T* xs = x + at;
      const T* gs = dy + at;
      T* to = dx + at;
      int64_t i = 0;
      for (; i + kLanes <= e.length; i += kLanes) {
        const Pack<T> centred = load(xs + i) - mean;
        const Pack<T> all = load(gs + i);
        const Pack<T> g = kRelu ? relu_gradient(centred * scale + beta, all, zeros) : all;
        store(to + i, g * scale + (centred * slope + offset));
      }
      for (; i < e.length; ++i) {
        const T centred = xs[i] - mean;
        const T g = kRelu ? relu_gradient(centred * scale + beta, gs[i], T(0)) : gs[i];
        to[i] = g * scale + (centred * slope + offset);
      }
    }
  }
}

}  // namespace
}  // namespace LOCKSTEP_ISA
}  // namespace lockstep

#include "dispatch.h"

namespace lockstep {
namespace LOCKSTEP_ISA {

extern const KernelTable table = kTable;

}  // namespace LOCKSTEP_ISA
}  // namespace lockstep
