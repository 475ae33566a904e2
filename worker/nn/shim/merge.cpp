#include "merge.h"

#include <algorithm>
#include <cmath>

namespace lockstep {

Moments::Moments(const std::vector<double>& merged, double eps) : count(merged[0]) {
  const size_t channels = (merged.size() - 1) / 2;
  mean.assign(merged.begin() + 1, merged.begin() + 1 + channels);
  for (size_t c = 0; c < channels; ++c) {
    const double variance = count > 0 ? merged[1 + channels + c] / count : 0.0;
    inverse_std.push_back(1.0 / std::sqrt(variance + eps));
  }
}

Moments::Moments(const torch::Tensor& packed) {
  const double* values = packed.const_data_ptr<double>();
  const int64_t channels = (packed.numel() - 1) / 2;
  count = values[0];
  mean.assign(values + 1, values + 1 + channels);
  inverse_std.assign(values + 1 + channels, values + 1 + 2 * channels);
}

torch::Tensor Moments::pack() const {
  torch::Tensor packed = torch::empty({static_cast<int64_t>(1 + 2 * mean.size())}, torch::kDouble);
  double* values = packed.mutable_data_ptr<double>();
  *values++ = count;
  values = std::copy(mean.begin(), mean.end(), values);
  std::copy(inverse_std.begin(), inverse_std.end(), values);
  return packed;
}

torch::Tensor to_tensor(const std::vector<double>& values, const torch::TensorOptions& options) {
  return torch::tensor(values, torch::kDouble).to(options);
}

std::vector<double> to_vector(const torch::Tensor& tensor) {
  const torch::Tensor host = tensor.to(torch::kCPU, torch::kDouble).contiguous();
  const double* values = host.const_data_ptr<double>();
  return {values, values + host.numel()};
}

}  // namespace lockstep
