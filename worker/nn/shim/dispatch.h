// One layout's kernels as a table: whether a ReLU follows is asked at run time, and settled here once for all values.
// Included by each layout's file, behind its own `moments` and `..._rows`.
#pragma once

namespace lockstep {
namespace LOCKSTEP_ISA {
namespace {

template <class T>
void normalize(const T* x, T* y, Extent e, Affine<T> affine) {
  affine.relu ? normalize_rows<T, true>(x, y, e, affine) : normalize_rows<T, false>(x, y, e, affine);
}

template <class T>
void gradient_sums(
    const T* x, const T* dy, Extent e, Affine<T> affine, const double* mean, double* sum, double* sum_centred) {
  affine.relu ? gradient_sums_rows<T, true>(x, dy, e, affine, mean, sum, sum_centred)
              : gradient_sums_rows<T, false>(x, dy, e, affine, mean, sum, sum_centred);
}

template <class T>
void input_gradient(
    const T* x, const T* dy, T* dx, Extent e, Affine<T> affine, const T* slope, const T* offset) {
  affine.relu ? input_gradient_rows<T, true>(x, dy, dx, e, affine, slope, offset)
              : input_gradient_rows<T, false>(x, dy, dx, e, affine, slope, offset);
}

constexpr KernelTable kTable = {
    {moments<float>, normalize<float>, gradient_sums<float>, input_gradient<float>},
    {moments<double>, normalize<double>, gradient_sums<double>, input_gradient<double>},
};

}  // namespace
}  // namespace LOCKSTEP_ISA
}  // namespace lockstep
