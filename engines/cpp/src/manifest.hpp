// An engine directory's qwenport.json: parsed, with every field that the runtime relies on checked.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "chat/template.hpp"
#include "qwenport/qwenport.hpp"

namespace qwenport::detail {

/// A file next to the manifest.
struct FileRecord {
  std::string name;
  std::uint64_t bytes = 0;
  std::string sha256;  ///< 64 lower-case hexadecimal digits
};

/// A pair of bindings at one address.
struct CacheBinding {
  std::string past;
  std::string present;
};

/// How an engine attends to its cache: see docs/reference/manifests.md.
struct Attention {
  std::string form;
  int span_multiple = 0;  ///< the first span, of which all others are multiples
  int slots = 0;          ///< of a cache in the bindings, at least the capacity
};

/// The steps that one of TensorRT's profiles admits; an engine for onnxruntime states one.
struct Profile {
  int least = 1;   ///< tokens per row
  int tokens = 0;  ///< tokens per row, at most
  int span = 0;    ///< slots, at most
};

struct Manifest {
  EngineInfo info;
  /// Only with dual chunk attention that scales by length: requests of at most so many positions are not scaled.
  std::optional<int> unscaled_length;
  /// Bytes that a step needs for each token and slot of its span, at most; 0: few, or what its profiles admit.
  std::int64_t score_bytes = 0;
  Attention attention;
  std::vector<Profile> profiles;
  int heads = 0;  ///< of the queries
  int kv_heads = 0;
  int head_dim = 0;
  int element_bytes = 0;  ///< of a cache element
  FileRecord model;       ///< TensorRT's plan, or onnxruntime's graph
  FileRecord weights;     ///< onnxruntime only; the SHA-256 is that of its safetensors header
  std::string sha256;     ///< of the manifest's text
  std::string identity;   ///< 64 characters that tell this engine's snapshots from another's
  std::vector<FileRecord> plugins;
  std::optional<FileRecord> tokenizer;
  std::optional<FileRecord> proof;
  std::string package_sha256;        ///< of the package's manifest; only if there is a proof
  std::vector<CacheBinding> caches;  ///< ordered by the names of their outputs
  std::vector<std::string> queries;  ///< outputs whose values are not used
  std::vector<Token> stop_tokens;    ///< the model's
  std::optional<ChatTemplate> chat;
  std::string no_chat;  ///< why there is none

  /// Bytes of one slot of one head in a cache binding.
  [[nodiscard]] std::size_t slot_bytes() const noexcept {
    return static_cast<std::size_t>(head_dim) * static_cast<std::size_t>(element_bytes);
  }
  /// Bytes of one row of a cache binding, [kv_heads, slots, head_dim].
  [[nodiscard]] std::size_t row_bytes(int slots) const noexcept {
    return static_cast<std::size_t>(kv_heads) * static_cast<std::size_t>(slots) * slot_bytes();
  }
  [[nodiscard]] bool is_onnxruntime() const noexcept;
};

/// Parse and check a manifest.
/// \param text the file's content. \param where its path, for messages.
/// \throws Error bad_engine.
Manifest parse_manifest(std::string_view text, const std::string& where);

/// How the engine in a directory writes conversations. \throws Error bad_engine: it cannot; the message says why.
const ChatTemplate& chat_template(const Manifest& manifest, const std::string& directory);

/// Read `directory`/qwenport.json. \throws Error bad_engine, invalid_argument (an empty name).
Manifest read_manifest(const std::string& directory);

}  // namespace qwenport::detail
