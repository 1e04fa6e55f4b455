#include "manifest.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <iterator>
#include <nlohmann/json.hpp>

#include "contract.hpp"
#include "files.hpp"
#include "sha256.hpp"
#include "target.hpp"

namespace qwenport::detail {
namespace {

using nlohmann::json;

constexpr std::int64_t max_int = 0x7fffffff;
constexpr std::uint64_t max_row_bytes = std::uint64_t{1} << 42U;  // 4 TiB: a larger value is damage

[[noreturn]] void fail(const std::string& where, const std::string& message) {
  throw Error(ErrorCode::bad_engine, where + ": " + message);
}

/// A value in the document, and the path to it for messages.
class Node {
 public:
  Node(const json& value, std::string path, const std::string& where)
      : value_(value), path_(std::move(path)), where_(where) {}

  [[nodiscard]] bool has(const char* key) const { return object().contains(key); }
  [[nodiscard]] Node at(const std::string& key) const {
    const auto found = object().find(key);
    if (found == value_.end()) fail(where_, "damaged: no " + join(key));
    return {*found, join(key), where_};
  }
  [[nodiscard]] Node at(std::size_t index) const {
    if (!value_.is_array() || index >= value_.size()) {
      fail(where_, "damaged: no " + path_ + "[" + std::to_string(index) + "]");
    }
    return {value_[index], path_ + "[" + std::to_string(index) + "]", where_};
  }
  [[nodiscard]] std::size_t size() const {
    if (!value_.is_array()) wrong("a list");
    return value_.size();
  }
  [[nodiscard]] std::vector<std::string> keys() const {
    std::vector<std::string> names;
    for (const auto& item : object().items()) names.push_back(item.key());
    return names;
  }
  [[nodiscard]] bool is_null() const { return value_.is_null(); }
  [[nodiscard]] bool is_text() const { return value_.is_string(); }
  [[nodiscard]] std::string text() const {
    if (!value_.is_string()) wrong("a text");
    return value_.get<std::string>();
  }
  [[nodiscard]] int positive() const { return at_least(1, "a positive integer"); }
  [[nodiscard]] int not_negative() const { return at_least(0, "an integer that is not negative"); }
  [[nodiscard]] Token token(int vocab_size) const {
    if (!value_.is_number_unsigned() ||
        value_.get<std::uint64_t>() >= static_cast<std::uint64_t>(vocab_size)) {
      wrong("a token of the vocabulary");
    }
    return value_.get<Token>();
  }
  [[nodiscard]] std::uint64_t count() const {
    if (!value_.is_number_unsigned()) wrong("a number of bytes");
    return value_.get<std::uint64_t>();
  }
  [[noreturn]] void wrong(const std::string& expected) const {
    fail(where_, "damaged: " + path_ + " is not " + expected);
  }
  [[noreturn]] void refuse(const std::string& why) const { fail(where_, path_ + " " + why); }

 private:
  [[nodiscard]] int at_least(std::int64_t least, const char* what) const {
    const bool fits = value_.is_number_integer() &&
                      (value_.is_number_unsigned() ? value_.get<std::uint64_t>() <= max_int
                                                   : value_.get<std::int64_t>() <= max_int) &&
                      value_.get<std::int64_t>() >= least;
    if (!fits) wrong(what);
    return value_.get<int>();
  }

  [[nodiscard]] const json& object() const {
    if (!value_.is_object()) wrong("an object");
    return value_;
  }
  [[nodiscard]] std::string join(const std::string& key) const {
    return path_.empty() ? key : path_ + "." + key;
  }

  const json& value_;
  std::string path_;
  const std::string& where_;
};

/// \param hash the key of the SHA-256: of the file, or of its header.
FileRecord file_record(const Node& files, const std::string& name, const char* hash = "sha256") {
  const Node recorded = files.at(name);
  FileRecord file{name, recorded.at("bytes").count(), recorded.at(hash).text()};
  if (file.sha256.size() != 64 || file.sha256.find_first_not_of("0123456789abcdef") != std::string::npos) {
    recorded.at(hash).wrong("a SHA-256");
  }
  return file;
}

/// A binding's dtype and shape as one string: "float [batch,2,512,32]".
std::string signature(const Node& binding) {
  std::string text = binding.at("dtype").text() + " [";
  const Node shape = binding.at("shape");
  for (std::size_t i = 0; i < shape.size(); ++i) {
    const Node size = shape.at(i);
    text += (i != 0 ? "," : "") + (size.is_text() ? size.text() : std::to_string(size.positive()));
  }
  return text + "]";
}

/// Name -> signature.
std::map<std::string, std::string> signatures(const Node& bindings) {
  std::map<std::string, std::string> found;
  for (std::size_t i = 0; i < bindings.size(); ++i) {
    const Node binding = bindings.at(i);
    if (!found.emplace(binding.at("name").text(), signature(binding)).second) {
      binding.at("name").wrong("a name of its own");
    }
  }
  return found;
}

/// nullptr if there is no such dtype.
const contract::Dtype* find_dtype(const std::string& name) {
  const auto* const found = std::find_if(std::begin(contract::dtypes), std::end(contract::dtypes),
                                         [&](const contract::Dtype& dtype) { return dtype.name == name; });
  return found == std::end(contract::dtypes) ? nullptr : found;
}

void read_attention(const Node& node, Manifest& manifest) {
  Attention& attention = manifest.attention;
  attention.form = node.at("form").text();
  attention.span_multiple = node.at("span_multiple").positive();
  attention.slots = node.at("slots").positive();
  bool agree = false;
  if (attention.form == contract::masked) {
    agree = attention.span_multiple == contract::span_multiple && attention.slots == manifest.info.capacity;
  } else if (attention.form == contract::direct) {
    agree = attention.span_multiple == attention.slots;
  } else if (attention.form == contract::chunked || attention.form == contract::split) {
    agree = attention.slots % attention.span_multiple == 0;
  } else {
    node.at("form").wrong(std::string(contract::masked) + ", " + contract::direct + ", " + contract::chunked +
                          " or " + contract::split);
  }
  if (!agree || attention.slots < manifest.info.capacity) {
    node.wrong("spans and slots of form " + attention.form + " for this max_seq_len");
  }
}

/// The settings of dual chunk attention: of them a session needs only what follows.
void read_dual_chunk(const Node& node, Manifest& manifest) {
  const auto positions = [&node](const char* key) {
    const int found = node.at(key).positive();
    if (found > contract::most_positions) node.at(key).wrong("a number of positions that any model has");
    return found;
  };
  if (positions("chunk_size") <= node.at("local_size").not_negative()) {
    node.at("chunk_size").wrong("larger than local_size");
  }
  const char* const original = "original_max_position_embeddings";
  if (!node.at(original).is_null()) manifest.unscaled_length = positions(original);
  for (const std::string& key : node.keys()) {
    if (key != "chunk_size" && key != "local_size" && key != original) {
      node.refuse("has the unknown setting " + key);
    }
  }
  manifest.score_bytes = std::int64_t{contract::score_bytes} * manifest.heads;
}

void read_sizes(const Node& root, Manifest& manifest) {
  EngineInfo& info = manifest.info;
  const Node model = root.at("model");
  info.vocab_size = model.at("vocab_size").positive();
  manifest.heads = model.at("num_attention_heads").positive();
  manifest.kv_heads = model.at("num_key_value_heads").positive();
  manifest.head_dim = model.at("head_dim").positive();
  if (model.has("dual_chunk") && !model.at("dual_chunk").is_null()) {
    read_dual_chunk(model.at("dual_chunk"), manifest);
  }
  info.capacity = root.at("max_seq_len").positive();
  info.max_batch = root.at("max_batch").positive();
  info.dtype = root.at("dtype").text();
  const contract::Dtype* const dtype = find_dtype(info.dtype);
  if (dtype == nullptr) {
    std::string names;
    for (const contract::Dtype& each : contract::dtypes) names += std::string(" ") + each.name;
    root.at("dtype").wrong("one of" + names);
  }
  manifest.element_bytes = dtype->itemsize;
  read_attention(root.at("attention"), manifest);
  // Below, sizes are products of these; none may overflow.
  const auto limit = static_cast<long double>(max_row_bytes);
  if (static_cast<long double>(std::max(manifest.heads, manifest.kv_heads)) * manifest.attention.slots *
          manifest.head_dim * manifest.element_bytes * info.max_batch >
      limit) {
    root.at("model").wrong("of a size that any machine has");
  }
  const Node profiles = root.at("profiles");
  if (profiles.size() == 0) profiles.wrong("a list of profiles");
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    const Node tokens = profiles.at(i).at(contract::input_ids);
    const Node widest = tokens.at("max");
    const Node longest = profiles.at(i).at(contract::key_positions).at("max");
    const Profile profile{tokens.at("min").at(1).positive(), widest.at(1).positive(),
                          longest.at(std::size_t{0}).positive()};
    if (widest.at(std::size_t{0}).positive() != info.max_batch) widest.wrong("of max_batch rows");
    if (profile.tokens > info.capacity) widest.wrong("within max_seq_len");
    if (profile.least > profile.tokens) tokens.at("min").wrong("within its maximum");
    if (profile.span > manifest.attention.slots) longest.wrong("within the cache's slots");
    info.max_step_tokens = std::max(info.max_step_tokens, profile.tokens);
    manifest.profiles.push_back(profile);
  }
  const bool reads_all = std::any_of(
      manifest.profiles.begin(), manifest.profiles.end(),
      [&manifest](const Profile& each) { return each.least == 1 && each.span == manifest.attention.slots; });
  if (!reads_all) profiles.wrong("with one for single tokens over all slots");
}

void read_quantization(const Node& root, EngineInfo& info) {
  const Node node = root.at("quantization");
  info.weights = node.is_null() ? info.dtype : node.at("weights").text();
  info.activations = node.is_null() ? info.dtype : node.at("activations").text();
  if (info.activations != contract::int8 && info.activations != contract::e4m3 &&
      find_dtype(info.activations) == nullptr) {
    node.at("activations").wrong(std::string("a dtype, ") + contract::int8 + " or " + contract::e4m3);
  }
}

void read_bindings(const Node& root, Manifest& manifest) {
  // onnxruntime takes a cache of any length; TensorRT fixes it.
  const std::string slots =
      manifest.is_onnxruntime() ? contract::capacity_axis : std::to_string(manifest.attention.slots);
  const std::string dtype = find_dtype(manifest.info.dtype)->binding;
  const std::string cache = dtype + " [batch," + std::to_string(manifest.kv_heads) + "," + slots + "," +
                            std::to_string(manifest.head_dim) + "]";
  std::map<std::string, std::string> inputs{{contract::input_ids, "int64 [batch,seq]"},
                                            {contract::position_ids, "int64 [batch,seq]"},
                                            {contract::write_indices, "int64 [batch]"},
                                            {contract::key_positions, "int64 [span]"},
                                            {contract::logits_indices, "int64 [batch,n]"}};
  if (manifest.unscaled_length) inputs.emplace(contract::request_lengths, "int64 [batch]");
  std::map<std::string, std::string> outputs{
      {contract::logits, "float [batch,n," + std::to_string(manifest.info.vocab_size) + "]"}};
  const Node aliases = root.at("aliases");
  for (const std::string& present : aliases.keys()) {
    const std::string past = aliases.at(present).text();
    if (!inputs.emplace(past, cache).second || !outputs.emplace(present, cache).second) {
      aliases.at(present).wrong("a binding of its own");
    }
    manifest.caches.push_back({past, present});
  }
  const int layers = root.at("model").at("num_hidden_layers").positive();
  if (manifest.caches.size() != 2 * static_cast<std::size_t>(layers)) {
    aliases.wrong("a key and a value for each of " + std::to_string(layers) + " layers");
  }
  if (manifest.attention.form == contract::direct || manifest.attention.form == contract::split) {
    const std::string query = dtype + " [batch," + std::to_string(manifest.heads) + ",seq," +
                              std::to_string(manifest.head_dim) + "]";
    for (int layer = 0; layer < layers; ++layer) {
      manifest.queries.push_back(contract::query_prefix + std::to_string(layer));
      if (!outputs.emplace(manifest.queries.back(), query).second) {
        aliases.wrong("without " + manifest.queries.back());
      }
    }
  }
  const Node bindings = root.at("bindings");
  if (signatures(bindings.at("inputs")) != inputs) bindings.at("inputs").wrong("what this runtime feeds");
  if (signatures(bindings.at("outputs")) != outputs) bindings.at("outputs").wrong("what this runtime reads");
}

void read_target(const Node& root, Manifest& manifest) {
  EngineInfo& info = manifest.info;
  info.flavour = root.at("flavour").text();
  if (!manifest.is_onnxruntime() && info.flavour != contract::tensorrt &&
      info.flavour != contract::tensorrt_rtx) {
    root.at("flavour").wrong(std::string(contract::onnxruntime) + ", " + contract::tensorrt + " or " +
                             contract::tensorrt_rtx);
  }
  const char* const model = manifest.is_onnxruntime() ? contract::model_name : contract::plan_name;
  if (!root.at("files").has(model)) root.at("flavour").wrong(std::string("that of these files: no ") + model);
  info.runtime_version = root.at("runtime_version").text();
  const Node gpus = root.at("gpus");
  for (std::size_t i = 0; i < gpus.size(); ++i) info.gpus.push_back(gpus.at(i).text());
  if (manifest.is_onnxruntime()) {
    if (manifest.attention.form != contract::masked) {
      root.at("attention")
          .at("form")
          .wrong(std::string(contract::masked) + ", that of onnxruntime's engines");
    }
    if (!info.gpus.empty()) gpus.wrong("empty: onnxruntime's engines are for the CPU");
    if (info.dtype != "fp32") root.at("dtype").wrong("fp32, which onnxruntime's engines compute in");
    if (!release_number(info.runtime_version)) root.at("runtime_version").wrong("a release such as 1.26");
  } else {
    if (info.gpus.empty()) gpus.wrong("a list of GPU architectures");
    manifest.score_bytes = 0;  // the profiles say what there is memory for
  }
}

void read_files(const Node& root, Manifest& manifest) {
  const Node files = root.at("files");
  if (files.has(contract::tokenizer_name)) manifest.tokenizer = file_record(files, contract::tokenizer_name);
  if (files.has(contract::proof_name)) {
    manifest.proof = file_record(files, contract::proof_name);
    manifest.package_sha256 = root.at("package").at("manifest_sha256").text();
    manifest.info.has_proof = true;
  }
  if (manifest.is_onnxruntime()) {
    manifest.model = file_record(files, contract::model_name);
    manifest.weights = file_record(root.at("weights").at("files"), contract::weights_name, "header_sha256");
    return;
  }
  manifest.model = file_record(files, contract::plan_name);
  if (!root.has("plugins")) return;
  const Node plugins = root.at("plugins");
  for (std::size_t i = 0; i < plugins.size(); ++i) {
    const std::string name = plugins.at(i).text();
    if (name.empty() || name.find('/') != std::string::npos) plugins.at(i).wrong("a file's name");
    manifest.plugins.push_back(file_record(files, name));
  }
}

/// One of a list of names, by its place in that list.
template <typename Enum, std::size_t N>
Enum choice(const Node& node, const std::array<const char*, N>& names) {
  const auto* const found = std::find(names.begin(), names.end(), node.text());
  if (found == names.end()) {
    std::string expected = names[0];
    for (std::size_t i = 1; i < N; ++i) expected += (i + 1 < N ? ", " : " or ") + std::string(names[i]);
    node.wrong(expected);
  }
  return static_cast<Enum>(found - names.begin());
}

ContentFormat content_format(const Node& node) {
  constexpr std::array rules{"verbatim", "strip", "after_thinking", "after_thinking_lines",
                             "after_thinking_strip"};
  constexpr std::array places{"starts_with", "ends_with", "contains"};
  ContentFormat format{choice<ContentFormat::Rule>(node.at("rule"), rules), {}};
  const Node refused = node.at("refused");
  for (std::size_t i = 0; i < refused.size(); ++i) {
    const Node pair = refused.at(i);
    if (pair.size() != 2) pair.wrong("a place and a text");
    format.refused.push_back({choice<Place>(pair.at(std::size_t{0}), places), pair.at(1).text()});
  }
  return format;
}

ChatTemplate chat_template_of(const Node& node) {
  ChatTemplate format;
  const Node start = node.at("start_to_system");
  const Node end = node.at("system_to_user");
  if (start.is_null() != end.is_null()) end.wrong("null if, and only if, start_to_system is");
  if (!start.is_null()) {
    format.start_to_system = start.text();
    format.system_to_user = end.text();
  }
  format.start_to_user = node.at("start_to_user").text();
  format.user_to_assistant = node.at("user_to_assistant").text();
  format.assistant_to_user = node.at("assistant_to_user").text();
  format.user_to_reply = node.at("user_to_reply").text();
  const Node contents = node.at("contents");
  format.system = content_format(contents.at("system"));
  format.user = content_format(contents.at("user"));
  format.assistant = content_format(contents.at("assistant"));
  return format;
}

void read_text(const Node& root, Manifest& manifest) {
  const Node text = root.at("text");
  const Node stops = text.at("stop_tokens");
  for (std::size_t i = 0; i < stops.size(); ++i) {
    manifest.stop_tokens.push_back(stops.at(i).token(manifest.info.vocab_size));
  }
  const Node chat = text.at("chat");
  const Node reason = text.at("no_chat");
  if (chat.is_null() == reason.is_null()) reason.wrong("null if, and only if, there is a chat");
  if (chat.is_null()) {
    manifest.no_chat = reason.text();
  } else {
    manifest.chat = chat_template_of(chat);
  }
}

}  // namespace

bool Manifest::is_onnxruntime() const noexcept { return info.flavour == contract::onnxruntime; }

Manifest parse_manifest(std::string_view text, const std::string& where) {
  const json document = json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (document.is_discarded()) fail(where, "not a manifest: not JSON");
  const Node root(document, "", where);
  if (root.at("format").text() != contract::engine_format) {
    fail(where, "holds a " + root.at("format").text() + ", expected a " + contract::engine_format);
  }
  const int version = root.at("format_version").positive();
  if (version != contract::engine_version) {
    fail(where, std::string(contract::engine_format) + " format version " + std::to_string(version) +
                    ", this runtime reads " + std::to_string(contract::engine_version) +
                    "; build the engine again");
  }
  Manifest manifest;
  read_sizes(root, manifest);
  read_quantization(root, manifest.info);
  read_target(root, manifest);
  read_bindings(root, manifest);
  read_files(root, manifest);
  read_text(root, manifest);
  // The hashes of an onnxruntime engine's files do not cover its weights: the manifest says more about them.
  manifest.sha256 = sha256(text.data(), text.size());
  manifest.identity = manifest.is_onnxruntime() ? manifest.sha256 : manifest.model.sha256;
  manifest.info.cache_bytes_per_row = manifest.caches.size() * manifest.row_bytes(manifest.attention.slots);
  return manifest;
}

const ChatTemplate& chat_template(const Manifest& manifest, const std::string& directory) {
  if (!manifest.chat) {
    throw Error(ErrorCode::bad_engine, directory + ": " + manifest.no_chat);
  }
  return *manifest.chat;
}

Manifest read_manifest(const std::string& directory) {
  const std::string path = directory + "/" + contract::manifest_name;
  if (directory.empty())
    throw Error(ErrorCode::invalid_argument, "the name of the engine directory is empty");
  struct stat status{};
  if (lstat(path.c_str(), &status) != 0 && (errno == ENOENT || errno == ENOTDIR)) {
    fail(directory, std::string("no ") + contract::manifest_name + "; not an engine directory");
  }
  const MappedFile file(path);
  return parse_manifest({static_cast<const char*>(file.data()), file.size()}, path);
}

}  // namespace qwenport::detail
