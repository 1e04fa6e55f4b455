// The TensorRT plugin MoERouter: the operator's kind top_k.
#include "plugin.hpp"

#include "kernel.hpp"

namespace qwenport::cuda {
namespace {

using nvinfer1::Dims;

/// Input logits [..., experts]; outputs weights and indices [..., k].
struct MoERouter {
  static constexpr const char* name = contract::moe_router;
  static constexpr int inputs = 1;
  static constexpr int outputs = 2;
  static std::vector<Attribute> attributes() { return {{"k", 1, most_chosen}, {"normalize", 0, 1}}; }

  explicit MoERouter(const std::vector<std::int32_t>& values) : k(values[0]), normalize(values[1] != 0) {}

  static DataType output_type(int output, const DataType* /*in*/) {
    return output == 0 ? DataType::kFLOAT : DataType::kINT64;
  }
  static bool supports(int tensor, const DataType* types) {
    return tensor == 0 ? is_float(types[0]) : types[tensor] == output_type(tensor - 1, types);
  }
  [[nodiscard]] Complaint check(const Dims* in) const {
    if (in[0].nbDims < 1) return "logits have no axis of experts";
    const std::int64_t experts = in[0].d[in[0].nbDims - 1];
    if (experts >= 0 && (experts < k || experts > most_experts)) {
      return std::to_string(experts) + " experts; there can be " + std::to_string(k) + ".." +
             std::to_string(most_experts) + " to choose " + std::to_string(k) + " from";
    }
    return {};
  }
  void shapes(const DimsExprs* in, DimsExprs* out, IExprBuilder& build) const {
    for (int i = 0; i < outputs; ++i) {
      out[i] = in[0];
      out[i].d[out[i].nbDims - 1] = build.constant(k);
    }
  }
  [[nodiscard]] std::size_t workspace(const Dims* /*in*/, DataType /*type*/) const { return 0; }

  cudaError_t enqueue(const PluginTensorDesc* in, const void* const* from, void* const* to,
                      void* /*workspace*/, cudaStream_t stream) const {
    return with_type(in[0].type, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const Dims& logits = in[0].dims;
      RouteArguments<T> a{};
      a.logits = static_cast<const T*>(from[0]);
      a.weights = static_cast<float*>(to[0]);
      a.indices = static_cast<std::int64_t*>(to[1]);
      a.tokens = static_cast<int>(product(logits, 0, logits.nbDims - 1));
      a.experts = static_cast<int>(logits.d[logits.nbDims - 1]);
      a.k = k;
      a.normalize = normalize;
      return route(a, stream);
    });
  }

  int k;
  bool normalize;
};

const Registration registration(creator<MoERouter>);

}  // namespace
}  // namespace qwenport::cuda
