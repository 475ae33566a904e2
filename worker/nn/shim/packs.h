// What the kernels of both layouts share. Each file that includes this is compiled once per instruction set, into the
// namespace LOCKSTEP_ISA. No C++ library header is included: an inline function of one, compiled here for a wider set, could
// be the copy that the linker keeps for everyone.
#pragma once

#include <stdint.h>
#include <string.h>

namespace lockstep {
namespace LOCKSTEP_ISA {
namespace {

constexpr int64_t kLanes = 8;
typedef double Doubles __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32)));

template <class T>
struct PackOf;
template <>
struct PackOf<float> {
  using type = Floats;
};
template <>
struct PackOf<double> {
  using type = Doubles;
};
template <class T>
using Pack = typename PackOf<T>::type;

template <class T>
inline Pack<T> load(const T* from) {
  Pack<T> pack;
  memcpy(&pack, from, sizeof pack);
  return pack;
}

template <class T>
inline void store(T* to, Pack<T> pack) {
  memcpy(to, &pack, sizeof pack);
}

inline Doubles widen(Floats pack) { return __builtin_convertvector(pack, Doubles); }
inline Doubles widen(Doubles pack) { return pack; }

// A NaN passes through both, as in libtorch: a diverged run must not look alive.
template <class V, class Zero>
inline V relu(V value, Zero zero) {
  return value < zero ? zero : value;
}
template <class V, class G, class Zero>
inline G relu_gradient(V value, G gradient, Zero zero) {
  return value <= zero ? zero : gradient;
}

}  // namespace
}  // namespace LOCKSTEP_ISA
}  // namespace lockstep
