// Opens libtorch_cuda at run time, so that one binary serves hosts with and without a GPU, and has it compute the same bits
// each time.

#include <dlfcn.h>
#include <stdlib.h>
#include <torch/torch.h>

#include <string>

#include "failure.h"

extern "C" bool lockstep_load_cuda(lockstep::Failure* failure) noexcept {
  return lockstep::guarded(failure, [] {
    Dl_info info;
    // Any function of libtorch_cpu tells the folder that the loader took it from.
    auto* function = reinterpret_cast<void*>(&torch::autograd::impl::clear_hooks);
    TORCH_CHECK(dladdr(function, &info) != 0 && info.dli_fname != nullptr, "the folder of libtorch_cpu is unknown");
    std::string path(info.dli_fname);
    path.replace(path.rfind('/') + 1, std::string::npos, "libtorch_cuda.so");
    if (dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL) == nullptr) {
      throw std::runtime_error(dlerror());
    }
    // The same bits each time: libtorch's deterministic variants, and no multiplications of rounded numbers.
    at::Context& context = at::globalContext();
    setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    context.setDeterministicAlgorithms(true, /*warn_only=*/true);
    context.setDeterministicFillUninitializedMemory(false);
    context.setDeterministicCuDNN(true);
    context.setBenchmarkCuDNN(false);
    context.setAllowTF32CuDNN(false);
    context.setAllowTF32CuBLAS(false);
  });
}
