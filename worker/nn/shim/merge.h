// The Rust closure through which batch norm's values of one shard become those of all shards.
#pragma once

#include <torch/torch.h>

#include <vector>

#include "failure.h"

namespace lockstep {

// A Rust closure. `call` replaces the shard's values by the merged ones and returns an error or null.
struct MergeCallback {
  void* context;
  void* (*call)(void* context, bool backward, double* values, size_t count);
  void (*drop)(void* context);
  DropError drop_error;
};

// The callback, owned by the graph.
class Merger : public torch::CustomClassHolder {
 public:
  explicit Merger(MergeCallback callback) : callback_(callback) {}
  Merger(const Merger&) = delete;
  Merger& operator=(const Merger&) = delete;
  ~Merger() override { callback_.drop(callback_.context); }

  void merge(bool backward, std::vector<double>& values) const {
    if (void* error = callback_.call(callback_.context, backward, values.data(), values.size())) {
      throw CallbackError(error, callback_.drop_error);
    }
  }

 private:
  MergeCallback callback_;
};

// Statistics of the global batch.
struct Moments {
  double count;
  std::vector<double> mean;
  std::vector<double> inverse_std;

  // From [n, mean[C], M2[C]], with the biased variance that normalization uses.
  Moments(const std::vector<double>& merged, double eps);

  // For keeping in the graph.
  explicit Moments(const torch::Tensor& packed);

  torch::Tensor pack() const;
};

torch::Tensor to_tensor(const std::vector<double>& values, const torch::TensorOptions& options);

std::vector<double> to_vector(const torch::Tensor& tensor);

// What a shard that is alone has normalized with: [C] each, on its GPU.
struct Statistics {
  torch::Tensor mean;
  torch::Tensor inverse_std;
};

// Normalizes x [N, C, ...] on a GPU, with libtorch's kernels for batch norm over several processes, whose order of additions
// is fixed. x may be of half the precision of gamma; the sums have gamma's. Without a merger the shard is alone, and nothing
// leaves the GPU.
torch::Tensor device_batch_norm(
    const torch::Tensor& x,
    const torch::Tensor& gamma,
    const torch::Tensor& beta,
    double eps,
    bool relu,
    c10::intrusive_ptr<Merger> merger,
    Statistics* statistics);

}  // namespace lockstep
