#include "small_engine.hpp"

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <stdexcept>

#include "sha256.hpp"
#include "stand_in.hpp"

namespace stand_in {
namespace {

void put(std::string& file, std::initializer_list<std::uint32_t> numbers) {
  for (const std::uint32_t number : numbers) {
    file.append(reinterpret_cast<const char*>(&number), sizeof number);
  }
}

/// Replace what must be there once.
void replace(std::string& text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  if (at == std::string::npos) throw std::logic_error("no " + from);
  text.replace(at, from.size(), to);
}

}  // namespace

std::string small_tokenizer() {
  std::string file("qwenport-tokenizer");
  file.resize(20);
  put(file, {1, 1, 5, 259, 2, 1, 1, 0, 266});
  for (std::uint32_t byte = 0; byte < 256; ++byte) put(file, {byte});
  for (std::uint32_t id = 0; id <= 256; ++id) put(file, {id});
  put(file, {258, 261, 266});
  put(file, {'a', 'b', 256, 256, 'c', 257});
  put(file, {258, 16, 261, 5});
  put(file, {258});
  for (int id = 0; id < 258; ++id) file += '\2';
  file += '\1';
  for (int byte = 0; byte < 256; ++byte) file += static_cast<char>(byte);
  return file + "ababc<|x|>";
}

std::string_view small_chat() {
  return R"({"start_to_system": "<|x|>s ", "system_to_user": "<|x|>u ", "start_to_user": "<|x|>u ",
    "user_to_assistant": "<|x|>a ", "assistant_to_user": "<|x|>u ", "user_to_reply": "<|x|>a ",
    "contents": {"system": {"rule": "verbatim", "refused": [["ends_with", "!"]]},
      "user": {"rule": "strip", "refused": [["starts_with", "<tool>"]]},
      "assistant": {"rule": "after_thinking_lines", "refused": [["contains", "<call>"]]}}})";
}

Directory::Directory(const std::string& tokenizer, std::string_view chat, int unscaled_length) {
  path_ = (std::filesystem::temp_directory_path() / "qwenport-XXXXXX").string();
  if (mkdtemp(path_.data()) == nullptr) throw std::runtime_error("no temporary directory");
  const std::string name = "tokenizer.qwenport";
  std::string manifest = toy_manifest_text(64, 2, 16, small_vocab);
  if (unscaled_length != 0) manifest = with_dual_chunk(manifest, unscaled_length);
  if (!tokenizer.empty()) {
    replace(manifest, R"("files": {)",
            R"("files": {")" + name + R"(": {"bytes": )" + std::to_string(tokenizer.size()) +
                R"(, "sha256": ")" + qwenport::detail::sha256(tokenizer.data(), tokenizer.size()) + "\"},");
    std::ofstream(path_ + "/" + name, std::ios::binary) << tokenizer;
  }
  if (chat != "null") {
    replace(manifest, R"("stop_tokens": [], "chat": null, "no_chat": "a toy has no chat template")",
            R"("stop_tokens": [258], "chat": )" + std::string(chat) + R"(, "no_chat": null)");
  }
  std::ofstream(path_ + "/qwenport.json") << manifest;
}

Directory::~Directory() { std::filesystem::remove_all(path_); }

}  // namespace stand_in
