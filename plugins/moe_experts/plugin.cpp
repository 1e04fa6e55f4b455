// The TensorRT plugin MoEExperts: the operator with indices by token.
#include "plugin.hpp"

#include <algorithm>

#include "kernel.hpp"

namespace qwenport::cuda {
namespace {

using nvinfer1::Dims;

/// Inputs x [..., hidden], indices and weights [..., k], gate_up [experts, 2*inner, hidden], down [experts, hidden,
/// inner]; output y [..., hidden].
struct MoEExperts {
  static constexpr const char* name = contract::moe_experts;
  static constexpr int inputs = 5;
  static constexpr int outputs = 1;
  static std::vector<Attribute> attributes() { return {}; }

  explicit MoEExperts(const std::vector<std::int32_t>& /*values*/) {}

  static DataType output_type(int /*output*/, const DataType* in) { return in[0]; }
  static bool supports(int tensor, const DataType* types) {
    if (tensor == 1) return types[1] == DataType::kINT64;
    if (tensor == 2) return types[2] == DataType::kFLOAT;
    return is_float(types[0]) && types[tensor] == types[0];
  }
  [[nodiscard]] Complaint check(const Dims* in) const {
    const Dims& x = in[0];
    const Dims& indices = in[1];
    const Dims& gate_up = in[3];
    const Dims& down = in[4];
    if (x.nbDims < 1 || indices.nbDims != x.nbDims || in[2].nbDims != x.nbDims) {
      return "x " + text(x) + ", indices " + text(indices) + " and weights " + text(in[2]) +
             " are not of the same tokens";
    }
    const int last = x.nbDims - 1;
    for (int d = 0; d <= last; ++d) {
      if ((d < last && !agree(x.d[d], indices.d[d])) || !agree(indices.d[d], in[2].d[d])) {
        return "x " + text(x) + ", indices " + text(indices) + " and weights " + text(in[2]) +
               " are not of the same tokens";
      }
    }
    if (gate_up.nbDims != 3 || down.nbDims != 3 || !agree(gate_up.d[0], down.d[0]) ||
        !agree(gate_up.d[1], 2 * down.d[2]) || !agree(gate_up.d[2], x.d[last]) ||
        !agree(down.d[1], x.d[last])) {
      return "gate_up " + text(gate_up) + " and down " + text(down) +
             " are not [experts, 2*inner, hidden] and [experts, hidden, inner]";
    }
    if (indices.d[last] > most_chosen || indices.d[last] == 0 || down.d[0] > most_experts) {
      return std::to_string(indices.d[last]) + " of " + std::to_string(down.d[0]) +
             " experts; there can be 1.." + std::to_string(most_chosen) + " of " +
             std::to_string(most_experts);
    }
    if (product(indices, 0, indices.nbDims) > most_pairs)
      return "more than 2^30 tokens times experts a token";
    return {};
  }
  void shapes(const DimsExprs* in, DimsExprs* out, IExprBuilder& /*build*/) const { out[0] = in[0]; }
  [[nodiscard]] std::size_t workspace(const Dims* in, DataType type) const {
    const Sizes s(in);
    return with_type(type, [&](auto* of_type) {
      using T = std::remove_pointer_t<decltype(of_type)>;
      return experts_workspace<T>(s.tokens, s.k, s.experts, s.hidden, s.inner);
    });
  }

  cudaError_t enqueue(const PluginTensorDesc* in, const void* const* from, void* const* to, void* workspace,
                      cudaStream_t stream) const {
    const Dims dims[] = {in[0].dims, in[1].dims, in[2].dims, in[3].dims, in[4].dims};
    const Sizes s(dims);
    return with_type(in[0].type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      return apply_experts<T>(
          {static_cast<const T*>(from[0]), static_cast<const std::int64_t*>(from[1]),
           static_cast<const float*>(from[2]), static_cast<const T*>(from[3]), static_cast<const T*>(from[4]),
           static_cast<T*>(to[0]), s.tokens, s.k, s.experts, s.hidden, s.inner, workspace},
          stream);
    });
  }

 private:
  struct Sizes {
    /// Clamps profile maxima to what the kernel accepts.
    explicit Sizes(const Dims* in)
        : k(static_cast<int>(in[1].d[in[1].nbDims - 1])),
          tokens(static_cast<int>(std::min(product(in[0], 0, in[0].nbDims - 1), most_pairs / k))),
          experts(static_cast<int>(in[4].d[0])),
          hidden(static_cast<int>(in[4].d[1])),
          inner(static_cast<int>(in[4].d[2])) {}
    int k, tokens, experts, hidden, inner;
  };
};

const Registration registration(creator<MoEExperts>);

}  // namespace
}  // namespace qwenport::cuda
