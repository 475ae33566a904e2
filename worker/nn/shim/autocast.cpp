// Autocast to bfloat16 for the calling thread.

#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include "failure.h"

namespace {

using lockstep::Failure;

c10::DeviceType device_type(bool cuda) { return cuda ? at::kCUDA : at::kCPU; }

}  // namespace

// Switches autocast on or off; `before` tells what it was.
extern "C" bool lockstep_autocast(bool cuda, bool on, bool* before, Failure* failure) {
  return lockstep::guarded(failure, [&] {
    const c10::DeviceType type = device_type(cuda);
    *before = at::autocast::is_autocast_enabled(type);
    if (on) {
      at::autocast::set_autocast_dtype(type, at::kBFloat16);
      // Each weight is used once in a pass, and a copy that outlives it would be of an older step.
      at::autocast::set_autocast_cache_enabled(false);
    }
    at::autocast::set_autocast_enabled(type, on);
  });
}
