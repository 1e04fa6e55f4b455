// The text of conversations; tests/cpp/test_chat.py compares that of a real template with transformers.
#include <doctest/doctest.h>

#include "qwenport/chat.h"
#include "qwenport/chat.hpp"
#include "small_engine.hpp"
#include "tokenizer/unicode.hpp"

namespace {

using qwenport::ChatFormat;
using qwenport::Error;
using qwenport::ErrorCode;
using stand_in::Directory;
using stand_in::small_chat;
using Messages = std::vector<qwenport::Message>;

/// Runs work that throws. \return its message.
template <typename Work>
std::string refusal(const Work& work, ErrorCode code = ErrorCode::invalid_argument) {
  try {
    work();
  } catch (const Error& error) {
    CHECK(error.code() == code);
    return error.what();
  }
  FAIL("nothing was thrown");
  return "";
}

std::string text_of(const Messages& messages) {
  const Directory directory("", small_chat());
  return ChatFormat::load(directory.path()).text(messages);
}

}  // namespace

TEST_CASE("the text of a conversation is the template's texts and the contents, as its rules leave them") {
  CHECK(text_of({{"user", "hi"}}) == "<|x|>u hi<|x|>a ");
  CHECK(text_of({{"system", " be "}, {"user", "hi"}}) == "<|x|>s  be <|x|>u hi<|x|>a ");
  CHECK(text_of({{"user", "1"}, {"assistant", "2"}, {"user", "3"}, {"assistant", "4"}, {"user", "5"}}) ==
        "<|x|>u 1<|x|>a 2<|x|>u 3<|x|>a 4<|x|>u 5<|x|>a ");
  CHECK(text_of({{"user", "\xFF"}}) == "<|x|>u \uFFFD<|x|>a ");
}

TEST_CASE("white space is that of Python's str.strip") {
  const std::string all =
      "\t\n\v\f\r\x1C\x1D\x1E\x1F "
      "\u0085\u00A0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
      "\u200A\u2028\u2029\u202F\u205F\u3000";
  const std::string kept = "a" + all + "b";
  const std::string padded = all + kept + all;
  const std::string expected = "<|x|>u " + kept + "<|x|>a ";
  CHECK(text_of({{"user", padded}}) == expected);
  CHECK(text_of({{"user", all}}) == "<|x|>u <|x|>a ");
  CHECK(text_of({{"user", ""}}) == "<|x|>u <|x|>a ");
  const std::string none = "\u200B\uFEFF\u180E\u2060\x08\x7F\u0084";
  for (std::size_t at = 0; at < none.size();) {
    const std::size_t size = qwenport::detail::character_at(none, at).size;
    const std::string one = none.substr(at, size);
    CHECK(text_of({{"user", one}}).find(one) != std::string::npos);
    at += size;
  }
}

TEST_CASE("what an assistant thought is left out") {
  const auto kept = [](const std::string& reply) {
    const std::string all = text_of({{"user", "q"}, {"assistant", reply}, {"user", "q"}});
    const std::string before = "<|x|>u q<|x|>a ";
    const std::string after = "<|x|>u q<|x|>a ";
    REQUIRE(all.size() >= before.size() + after.size());
    return all.substr(before.size(), all.size() - before.size() - after.size());
  };
  CHECK(kept("\n plain ") == "\n plain ");
  CHECK(kept("<think>a</think>\n\nb\n") == "b\n");
  CHECK(kept("a</think>b</think> c") == " c");
  CHECK(kept("a</think>\n\n").empty());
  CHECK(kept("</think").size() == 7);
}

TEST_CASE("contents that the template treats in a way of its own are refused, before the rule and after it") {
  const auto refused = [](const Messages& messages) { return refusal([&] { (void)text_of(messages); }); };
  CHECK(refused({{"user", "<tool>x"}}) ==
        "the content of a message of role \"user\" starts with \"<tool>\", which this model's chat template "
        "treats in a way "
        "of its own");
  CHECK(refused({{"user", " <tool>"}}).find("starts with \"<tool>\"") != std::string::npos);
  CHECK(text_of({{"user", "<tool"}}) == "<|x|>u <tool<|x|>a ");
  CHECK(refused({{"system", "be!"}, {"user", ""}}).find("ends with \"!\"") != std::string::npos);
  CHECK(text_of({{"system", "!be"}, {"user", ""}}) == "<|x|>s !be<|x|>u <|x|>a ");
  CHECK(refused({{"user", ""}, {"assistant", "x<call>y"}, {"user", ""}}).find("contains \"<call>\"") !=
        std::string::npos);
}

TEST_CASE("messages in another order are refused") {
  const auto refused = [](const Messages& messages) {
    const std::string message = refusal([&] { (void)text_of(messages); });
    const std::string accepted =
        "messages are an optional system message, then user and assistant in turn, the last a user's; ";
    REQUIRE(message.substr(0, accepted.size()) == accepted);
    return message.substr(accepted.size());
  };
  const std::string no_end = "these do not end with a user's";
  CHECK(refused({}) == no_end);
  CHECK(refused({{"system", ""}}) == no_end);
  CHECK(refused({{"user", ""}, {"assistant", ""}}) == no_end);
  CHECK(refused({{"assistant", ""}}) == "message 0 is of role \"assistant\"");
  CHECK(refused({{"user", ""}, {"user", ""}}) == "message 1 is of role \"user\"");
  CHECK(refused({{"user", ""}, {"system", ""}}) == "message 1 is of role \"system\"");
  CHECK(refused({{"system", ""}, {"system", ""}}) == "message 1 is of role \"system\"");
  CHECK(refused({{"tool", ""}}) == "message 0 is of role \"tool\"");
}

TEST_CASE("a template without a system message refuses one") {
  std::string chat(small_chat());
  for (const std::string name : {R"("start_to_system": )", R"("system_to_user": )"}) {
    const std::size_t at = chat.find(name) + name.size();
    chat.replace(at, chat.find(',', at) - at, "null");
  }
  const Directory directory("", chat);
  const auto format = ChatFormat::load(directory.path());
  CHECK(format.text({{"user", "hi"}}) == "<|x|>u hi<|x|>a ");
  CHECK(refusal([&] { (void)format.text({{"system", ""}, {"user", "hi"}}); }) ==
        "this model's chat template takes no system message");
}

TEST_CASE("an engine without a chat format says why") {
  const Directory directory("");
  CHECK(refusal([&] { ChatFormat::load(directory.path()); }, ErrorCode::bad_engine) ==
        directory.path() + ": a toy has no chat template");
  CHECK_THROWS_AS(ChatFormat::load("/nowhere"), Error);
}

TEST_CASE("the C API gives the same text, and refuses NULL by name") {
  const Directory directory("", small_chat());
  qwenport_chat_format* format = nullptr;
  REQUIRE(qwenport_chat_format_load(directory.path().c_str(), &format) == 0);
  const qwenport_message messages[] = {{"system", nullptr, 0}, {"user", "hi?", 2}};
  char* text = nullptr;
  size_t bytes = 0;
  REQUIRE(qwenport_chat_format_text(format, messages, 2, &text, &bytes) == 0);
  CHECK(std::string(text) == "<|x|>s <|x|>u hi<|x|>a ");
  CHECK(bytes == std::string(text).size());
  qwenport_text_free(text);

  const auto refused = [](int code, const char* message) {
    CHECK(code == QWENPORT_INVALID_ARGUMENT);
    CHECK(std::string(qwenport_last_error()) == message);
  };
  const qwenport_message no_role{nullptr, "", 0};
  const qwenport_message no_content{"user", nullptr, 1};
  refused(qwenport_chat_format_load(nullptr, &format), "directory is NULL");
  refused(qwenport_chat_format_load("x", nullptr), "format is NULL");
  refused(qwenport_chat_format_text(nullptr, messages, 2, &text, &bytes), "format is NULL");
  refused(qwenport_chat_format_text(format, nullptr, 1, &text, &bytes), "messages is NULL");
  refused(qwenport_chat_format_text(format, &no_role, 1, &text, &bytes), "messages[0].role is NULL");
  refused(qwenport_chat_format_text(format, &no_content, 1, &text, &bytes), "messages[0].content is NULL");
  refused(qwenport_chat_format_text(format, messages, 2, nullptr, &bytes), "text is NULL");
  refused(qwenport_chat_format_text(format, messages, 2, &text, nullptr), "bytes is NULL");
  CHECK(qwenport_chat_format_load("/nowhere", &format) == QWENPORT_BAD_ENGINE);
  qwenport_chat_format_free(format);
  qwenport_chat_format_free(nullptr);
}
