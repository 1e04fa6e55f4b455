// The toy network. Every cache slot gets numbers that are made of its token, its position, the length of its request (if the
// manifest says that lengths scale keys) and its place in the cache; the logits are a hash of all slots up to the last token, as read back from the caches. A slot
// that was not written, was overwritten, or lies in another row, layer or head gives other logits.
#include <algorithm>
#include <cstdint>
#include <sstream>

#include "stand_in.hpp"

namespace stand_in {

using qwenport::detail::Manifest;
using qwenport::detail::Profile;

namespace {

std::uint64_t mix(std::uint64_t z) {
  z = (z + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9;
  return z ^ (z >> 29U);
}

/// What lies at one place of a cache: a whole number that a float holds.
float content(std::int64_t token, std::int64_t position, std::int64_t request, std::uint64_t place) {
  const auto key =
      (static_cast<std::uint64_t>(request) * 1000003 + static_cast<std::uint64_t>(token)) * 1000003 +
      static_cast<std::uint64_t>(position);
  return static_cast<float>(mix(key * 1000003 + place) >> 40U);
}

/// Takes a slot's numbers in order of their places, one slot after the other.
class Hash {
 public:
  void take(float value) { state_ = mix(state_ ^ static_cast<std::uint64_t>(value)); }
  void logits(float* out, int vocab) const {
    for (int v = 0; v < vocab; ++v) {
      out[v] = static_cast<float>(mix(state_ + static_cast<std::uint64_t>(v)) >> 48U) / 4096.0F;
    }
  }

 private:
  std::uint64_t state_ = 0;
};

}  // namespace

Network toy_network(const Manifest& manifest) {
  return [&manifest](const Call& call) {
    check_call(manifest, call);
    const auto heads = static_cast<std::int64_t>(manifest.kv_heads);
    const std::int64_t slots = manifest.attention.slots;
    const std::int64_t dim = manifest.head_dim;
    const std::int64_t width = call.width();
    const auto for_each_place = [&](std::int64_t b, std::int64_t slot, const auto& visit) {
      std::uint64_t place = 0;
      for (const auto& binding : manifest.caches) {
        auto* cache = static_cast<float*>(call.memory.at(binding.present));
        for (std::int64_t h = 0; h < heads; ++h) {
          for (std::int64_t d = 0; d < dim; ++d)
            visit(cache[((b * heads + h) * slots + slot) * dim + d], place++);
        }
      }
    };
    auto* logits = static_cast<float*>(call.memory.at("logits"));
    for (std::int64_t b = 0; b < call.rows(); ++b) {
      const std::int64_t request = manifest.unscaled_length ? call.ints("request_lengths")[b] : 0;
      for (std::int64_t i = 0; i < width; ++i) {
        const std::int64_t token = call.ints("input_ids")[b * width + i];
        const std::int64_t position = call.ints("position_ids")[b * width + i];
        for_each_place(b, call.ints("write_indices")[b] + i, [&](float& value, std::uint64_t place) {
          value = content(token, position, request, place);
        });
      }
      Hash hash;
      const std::int64_t last = call.ints("position_ids")[b * width + call.ints("logits_indices")[b]];
      for (std::int64_t slot = 0; slot <= last; ++slot) {
        for_each_place(b, slot, [&hash](float& value, std::uint64_t) { hash.take(value); });
      }
      hash.logits(logits + b * manifest.info.vocab_size, manifest.info.vocab_size);
    }
  };
}

std::vector<float> toy_logits(const Manifest& manifest, const std::vector<std::int64_t>& tokens,
                              const std::vector<std::int64_t>& requests) {
  Hash hash;
  const std::uint64_t places =
      manifest.caches.size() * static_cast<std::size_t>(manifest.kv_heads * manifest.head_dim);
  for (std::size_t slot = 0; slot < tokens.size(); ++slot) {
    for (std::uint64_t place = 0; place < places; ++place) {
      hash.take(content(tokens[slot], static_cast<std::int64_t>(slot), requests.empty() ? 0 : requests[slot],
                        place));
    }
  }
  std::vector<float> logits(static_cast<std::size_t>(manifest.info.vocab_size));
  hash.logits(logits.data(), manifest.info.vocab_size);
  return logits;
}

namespace {

std::string profiles_text(const std::vector<Profile>& profiles, int max_batch) {
  std::string text;
  for (const Profile& each : profiles) {
    const auto tokens = [max_batch](int rows, int count) {
      return "[" + std::to_string(std::min(rows, max_batch)) + ", " + std::to_string(count) + "]";
    };
    text += (text.empty() ? "" : ",") + std::string(R"({"input_ids": {"min": )") + tokens(1, each.least) +
            R"(, "max": )" + tokens(max_batch, each.tokens) + R"(}, "key_positions": {"max": [)" +
            std::to_string(each.span) + "]}}";
  }
  return text;
}

}  // namespace

std::string toy_manifest_text(int capacity, int max_batch, int max_step_tokens, int vocab,
                              const std::string& form, bool two_profiles) {
  constexpr int layers = 2;
  const bool in_chunks = form == "chunked" || form == "split";
  const int slots = in_chunks ? (capacity + 255) / 256 * 256 : capacity;
  const int first = form == "direct" ? slots : 64;
  const int multiple = in_chunks ? 256 : first;
  std::ostringstream inputs;
  std::ostringstream outputs;
  std::ostringstream aliases;
  const auto binding = [](const std::string& name, const std::string& dtype, const std::string& shape) {
    return R"({"name": ")" + name + R"(", "dtype": ")" + dtype + R"(", "shape": )" + shape + "}";
  };
  const std::string cache = R"(["batch", 2, )" + std::to_string(slots) + ", 4]";
  inputs << binding("input_ids", "int64", R"(["batch", "seq"])") << ","
         << binding("position_ids", "int64", R"(["batch", "seq"])") << ","
         << binding("write_indices", "int64", R"(["batch"])") << ","
         << binding("key_positions", "int64", R"(["span"])") << ","
         << binding("logits_indices", "int64", R"(["batch", "n"])");
  outputs << binding("logits", "float", R"(["batch", "n", )" + std::to_string(vocab) + "]");
  for (int layer = 0; layer < layers; ++layer) {
    if (form == "direct" || form == "split") {
      outputs << "," << binding("query." + std::to_string(layer), "float", R"(["batch", 4, "seq", 4])");
    }
    for (const std::string part : {"key", "value"}) {
      const std::string tail = std::to_string(layer) + "." + part;
      inputs << "," << binding("past_key_values." + tail, "float", cache);
      outputs << "," << binding("present." + tail, "float", cache);
      aliases << (aliases.str().empty() ? "" : ",") << "\"present." << tail << "\": \"past_key_values."
              << tail << "\"";
    }
  }
  const std::vector<Profile> profiles{{1, 1, slots}, {1, max_step_tokens, slots}};
  std::ostringstream text;
  text << R"({"format": "qwenport-engine", "format_version": 6, "flavour": "tensorrt",
    "runtime_version": "10.14.1.48", "gpus": ["sm80", "sm90"], "dtype": "fp32",
    "max_seq_len": )"
       << capacity << R"(, "max_batch": )" << max_batch << R"(,
    "model": {"vocab_size": )"
       << vocab << R"(, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
      "num_hidden_layers": )"
       << layers << R"(},
    "attention": {"form": ")"
       << form << R"(", "span_multiple": )" << multiple << R"(, "slots": )" << slots << R"(},
    "quantization": null,
    "text": {"stop_tokens": [], "chat": null, "no_chat": "a toy has no chat template"},
    "profiles": [)"
       << profiles_text({profiles.begin() + (two_profiles ? 0 : 1), profiles.end()}, max_batch) << R"(],
    "bindings": {"inputs": [)"
       << inputs.str() << R"(], "outputs": [)" << outputs.str() << R"(]},
    "aliases": {)"
       << aliases.str() << R"(},
    "files": {"engine.plan": {"bytes": 3, "sha256":
      "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}}})";
  return text.str();
}

std::string with_profiles(std::string manifest, int max_batch, const std::vector<Profile>& profiles) {
  const std::string start = R"("profiles": [)";
  const std::size_t begin = manifest.find(start) + start.size();
  const std::size_t end = manifest.find(R"("bindings")", begin);
  return manifest.replace(begin, end - begin, profiles_text(profiles, max_batch) + "], ");
}

std::string with_dual_chunk(std::string manifest, int unscaled_length) {
  const auto insert_before = [&manifest](const std::string& place, const std::string& text) {
    manifest.insert(manifest.find(place), text);
  };
  const std::string original = unscaled_length == 0 ? "null" : std::to_string(unscaled_length);
  insert_before(R"("vocab_size")", R"("dual_chunk": {"chunk_size": 48, "local_size": 16,
      "original_max_position_embeddings": )" +
                                       original + "}, ");
  if (unscaled_length != 0) {
    insert_before(R"({"name": "input_ids")",
                  R"({"name": "request_lengths", "dtype": "int64", "shape": ["batch"]},)");
  }
  return manifest;
}

std::shared_ptr<const StandInModel> toy_model(int capacity, int max_batch, int max_step_tokens,
                                              const std::string& form, bool two_profiles) {
  return toy_model_of(toy_manifest_text(capacity, max_batch, max_step_tokens, 97, form, two_profiles));
}

std::shared_ptr<const StandInModel> toy_model_of(const std::string& text, std::int64_t score_bytes) {
  Manifest manifest = qwenport::detail::parse_manifest(text, "toy");
  manifest.score_bytes = score_bytes;
  const auto shared = std::make_shared<const Manifest>(manifest);
  return std::make_shared<const StandInModel>(std::move(manifest), [shared] {
    return Network([shared, network = toy_network(*shared)](const Call& call) { network(call); });
  });
}

}  // namespace stand_in
