// The passes of batch normalization on a CPU, over contiguous [N, C, L] data and over rows [N * L, C], which is what
// channels-last data are.
//
// Sums are in double precision and have a fixed order, so their bits depend on the data's shape and layout alone: neither
// on the instruction set nor on the number of threads.
#pragma once

#include <cstdint>

namespace lockstep {

struct Extent {
  int64_t samples;
  int64_t channels;
  int64_t length;  // values per sample and channel
};

// y = (x - mean) * scale + beta, per channel, then max(y, 0) if `relu`.
template <class T>
struct Affine {
  const T* mean;
  const T* scale;
  const T* beta;
  bool relu;
};

template <class T>
struct Kernels {
  // Per channel: the mean, and the sum of squared deviations from it. Zeros if there are no samples.
  void (*moments)(const T* x, Extent extent, double* mean, double* m2);
  void (*normalize)(const T* x, T* y, Extent extent, Affine<T> affine);
  // Per channel, with g = dy where the ReLU let the value through and 0 elsewhere: sum of g, and of g * (x - mean).
  void (*gradient_sums)(
      const T* x, const T* dy, Extent extent, Affine<T> affine, const double* mean, double* sum, double* sum_centred);
  // dx = g * scale + ((x - mean) * slope + offset).
  void (*input_gradient)(
      const T* x, const T* dy, T* dx, Extent extent, Affine<T> affine, const T* slope, const T* offset);
};

// `table` is for [N, C, L], `row_table` for rows: there each row counts as a sample of length 1.
struct KernelTable {
  Kernels<float> f32;
  Kernels<double> f64;
};

namespace generic { extern const KernelTable table, row_table; }
#if defined(__x86_64__)
namespace avx2 { extern const KernelTable table, row_table; }
namespace avx512 { extern const KernelTable table, row_table; }
#endif

}  // namespace lockstep
