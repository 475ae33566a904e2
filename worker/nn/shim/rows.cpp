// The kernels over rows [N * L, C]: neighbours in memory are channels. Each channel's sum adds its rows in their order.

#include "kernels.h"
#include "packs.h"

namespace lockstep {
namespace LOCKSTEP_ISA {
namespace {

// Calls `packed` for each kLanes channels, by the first of them, and `single` for each that is left.
template <class Packed, class Single>
inline void for_channels(int64_t channels, Packed packed, Single single) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) packed(c);
  for (; c < channels; ++c) single(c);
}

inline void add(double* sums, Doubles values) { store(sums, load(sums) + values); }

void clear(double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = 0.0;
}

template <class T>
void moments(const T* x, Extent e, double* mean, double* m2) {
  clear(mean, e.channels);
  clear(m2, e.channels);
  if (e.samples == 0) return;
  for (int64_t r = 0; r < e.samples; ++r) {
    const T* row = x + r * e.channels;
    for_channels(
        e.channels, [&](int64_t c) { add(mean + c, widen(load(row + c))); },
        [&](int64_t c) { mean[c] += static_cast<double>(row[c]); });
  }
  const double count = static_cast<double>(e.samples);
  for (int64_t c = 0; c < e.channels; ++c) mean[c] /= count;
  for (int64_t r = 0; r < e.samples; ++r) {
    const T* row = x + r * e.channels;
    for_channels(
        e.channels,
        [&](int64_t c) {
          const Doubles a = widen(load(row + c)) - load(mean + c);
          add(m2 + c, a * a);
        },
        [&](int64_t c) {
          const double a = static_cast<double>(row[c]) - mean[c];
          m2[c] += a * a;
        });
  }
}

template <class T, bool kRelu>
void normalize_rows(const T* x, T* y, Extent e, Affine<T> affine) {
  const Pack<T> zeros = {};
  for (int64_t r = 0; r < e.samples; ++r) {
    const T* from = x + r * e.channels;
    T* to = y + r * e.channels;
    for_channels(
        e.channels,
        [&](int64_t c) {
          const Pack<T> value =
              (load(from + c) - load(affine.mean + c)) * load(affine.scale + c) + load(affine.beta + c);
          store(to + c, kRelu ? relu(value, zeros) : value);
        },
        [&](int64_t c) {
          const T value = (from[c] - affine.mean[c]) * affine.scale[c] + affine.beta[c];
          to[c] = kRelu ? relu(value, T(0)) : value;
        });
  }
}

template <class T, bool kRelu>
void gradient_sums_rows(
    const T* x, const T* dy, Extent e, Affine<T> affine, const double* mean, double* sum, double* sum_centred) {
  const Pack<T> zeros = {};
  clear(sum, e.channels);
  clear(sum_centred, e.channels);
  for (int64_t r = 0; r < e.samples; ++r) {
    const T* xs = x + r * e.channels;
    const T* gs = dy + r * e.channels;
    for_channels(
        e.channels,
        [&](int64_t c) {
          const Pack<T> value = load(xs + c), all = load(gs + c);
          const Pack<T> y = (value - load(affine.mean + c)) * load(affine.scale + c) + load(affine.beta + c);
          const Doubles g = widen(kRelu ? relu_gradient(y, all, zeros) : all);
          add(sum + c, g);
          add(sum_centred + c, g * (widen(value) - load(mean + c)));
        },
        [&](int64_t c) {
          const T y = (xs[c] - affine.mean[c]) * affine.scale[c] + affine.beta[c];
          const double g = static_cast<double>(kRelu ? relu_gradient(y, gs[c], T(0)) : gs[c]);
          sum[c] += g;
          sum_centred[c] += g * (static_cast<double>(xs[c]) - mean[c]);
        });
  }
}

template <class T, bool kRelu>
void input_gradient_rows(
    const T* x, const T* dy, T* dx, Extent e, Affine<T> affine, const T* slope, const T* offset) {
  const Pack<T> zeros = {};
  for (int64_t r = 0; r < e.samples; ++r) {
    const T* xs = x + r * e.channels;
    const T* gs = dy + r * e.channels;
    T* to = dx + r * e.channels;
    for_channels(
        e.channels,
        [&](int64_t c) {
          const Pack<T> centred = load(xs + c) - load(affine.mean + c), scale = load(affine.scale + c);
          const Pack<T> all = load(gs + c);
          const Pack<T> g = kRelu ? relu_gradient(centred * scale + load(affine.beta + c), all, zeros) : all;
          store(to + c, g * scale + (centred * load(slope + c) + load(offset + c)));
        },
        [&](int64_t c) {
          const T centred = xs[c] - affine.mean[c], scale = affine.scale[c];
          const T g = kRelu ? relu_gradient(centred * scale + affine.beta[c], gs[c], T(0)) : gs[c];
          to[c] = g * scale + (centred * slope[c] + offset[c]);
        });
  }
}

}  // namespace
}  // namespace LOCKSTEP_ISA
}  // namespace lockstep

#include "dispatch.h"

namespace lockstep {
namespace LOCKSTEP_ISA {

extern const KernelTable row_table = kTable;

}  // namespace LOCKSTEP_ISA
}  // namespace lockstep
