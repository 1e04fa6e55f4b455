// The TensorRT plugin RotaryEmbeddingQK: two of the operator's nodes, for queries and for keys, in one launch. (TensorRT's
// parser would take a node called RotaryEmbedding for ONNX's operator.)
#include "plugin.hpp"

#include "kernel.hpp"

namespace qwenport::cuda {
namespace {

using nvinfer1::Dims;

/// Inputs q, k, cos_cache, sin_cache, position_ids; outputs q and k, rotated.
struct RotaryEmbeddingQK {
  static constexpr const char* name = contract::rotary_embedding_qk;
  static constexpr int inputs = 5;
  static constexpr int outputs = 2;
  static std::vector<Attribute> attributes() { return {}; }

  explicit RotaryEmbeddingQK(const std::vector<std::int32_t>& /*values*/) {}

  static DataType output_type(int output, const DataType* in) { return in[output]; }
  static bool supports(int tensor, const DataType* types) {
    if (tensor == 4) return types[tensor] == DataType::kINT64;
    return is_float(types[0]) && types[tensor] == types[0];
  }
  [[nodiscard]] Complaint check(const Dims* in) const {
    const Dims& q = in[0];
    const Dims& k = in[1];
    if (q.nbDims != 4 || k.nbDims != 4 || !agree(q.d[0], k.d[0]) || !agree(q.d[2], k.d[2]) ||
        !agree(q.d[3], k.d[3])) {
      return "q " + text(q) + " and k " + text(k) +
             " are not [batch, heads, seq, head_dim] of the same tokens";
    }
    if (q.d[3] >= 0 && q.d[3] % 2 != 0) return "head_dim " + std::to_string(q.d[3]) + " is odd";
    for (const Dims& table : {in[2], in[3]}) {
      if (table.nbDims != 2 || !agree(table.d[0], in[2].d[0]) || !agree(2 * table.d[1], q.d[3])) {
        return "cos_cache " + text(in[2]) + " and sin_cache " + text(in[3]) +
               " are not [positions, head_dim/2]";
      }
    }
    if (in[4].nbDims != 2 || !agree(in[4].d[0], q.d[0]) || !agree(in[4].d[1], q.d[2])) {
      return "position_ids " + text(in[4]) + " is not [batch, seq]";
    }
    return {};
  }
  void shapes(const DimsExprs* in, DimsExprs* out, IExprBuilder& /*build*/) const {
    out[0] = in[0];
    out[1] = in[1];
  }
  [[nodiscard]] std::size_t workspace(const Dims* /*in*/, DataType /*type*/) const { return 0; }

  cudaError_t enqueue(const PluginTensorDesc* in, const void* const* from, void* const* to,
                      void* /*workspace*/, cudaStream_t stream) const {
    return with_type(in[0].type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const auto size = [in](int tensor, int d) { return static_cast<int>(in[tensor].dims.d[d]); };
      RotateArguments<T> a{};
      a.q = static_cast<const T*>(from[0]);
      a.k = static_cast<const T*>(from[1]);
      a.cos = static_cast<const T*>(from[2]);
      a.sin = static_cast<const T*>(from[3]);
      a.position_ids = static_cast<const std::int64_t*>(from[4]);
      a.q_out = static_cast<T*>(to[0]);
      a.k_out = static_cast<T*>(to[1]);
      a.batch = size(0, 0);
      a.q_heads = size(0, 1);
      a.k_heads = size(1, 1);
      a.seq = size(0, 2);
      a.head_dim = size(0, 3);
      a.positions = in[2].dims.d[0];
      return rotate(a, stream);
    });
  }
};

const Registration registration(creator<RotaryEmbeddingQK>);

}  // namespace
}  // namespace qwenport::cuda
