// What callbacks of a chat may do, and what is left of it when they or the device fail. And its C API.
#include <doctest/doctest.h>

#include <stdexcept>

#include "chat_script.hpp"
#include "qwenport/chat.h"
#include "qwenport/chat.hpp"
#include "stand_in.hpp"

namespace {

using qwenport::Chat;
using qwenport::ChatOptions;
using qwenport::Engine;
using qwenport::Error;
using qwenport::ErrorCode;
using stand_in::lines;
using stand_in::Stage;
using Lines = std::vector<std::string>;

ChatOptions greedy() {
  ChatOptions options;
  options.generate.max_new_tokens = 4;
  options.generate.temperature = 0.9;
  return options;
}

/// A chat must answer as one does to which nothing has happened but these messages.
void check_like_new(Chat& chat, const Engine& engine, const ChatOptions& options, const Lines& messages) {
  Chat other(engine, options);
  for (const std::string& message : messages) other.send(message);
  CHECK(lines(chat.history()) == lines(other.history()));
  for (int n = 0; n < 2; ++n) {
    const auto found = chat.send("x");
    const auto expected = other.send("x");
    CHECK(found.text == expected.text);
    CHECK(found.prompt_tokens == expected.prompt_tokens);
  }
}

}  // namespace

TEST_CASE("after an exception from on_text the chat is as before the call") {
  Stage stage;
  for (const int before : {0, 1, 2}) {
    CAPTURE(before);
    const Lines messages(static_cast<std::size_t>(before), "hi");
    Chat chat(stage.engine, greedy());
    for (const std::string& message : messages) chat.send(message);
    CHECK_THROWS_AS(chat.send("other", [](std::string_view) { throw std::runtime_error("enough"); }),
                    std::runtime_error);
    check_like_new(chat, stage.engine, greedy(), messages);
  }
}

TEST_CASE("so it is after text that was held back to the end, and where turns had left") {
  Stage stage;
  ChatOptions options = stage.scripted();
  options.session.capacity = 30;
  options.generate.max_new_tokens = 8;
  options.drop_oldest = true;
  options.stop_strings = {"kz"};
  Chat chat(stage.engine, options);
  stage.script.next = {'k'};
  for (const char* message : {"1", "22"}) chat.send(message);
  const auto before = lines(chat.history());
  CHECK_THROWS_AS(chat.send("333333", [](std::string_view) { throw std::runtime_error("enough"); }),
                  std::runtime_error);
  CHECK(lines(chat.history()) == before);
  CHECK(chat.send("333333").dropped > 0);
}

TEST_CASE("a callback's call of its chat is refused, ends the reply and changes nothing") {
  Stage stage;
  using Use = void (*)(Chat&);
  const Use uses[] = {[](Chat& chat) { chat.send("x"); }, [](Chat& chat) { chat.reset(); }};
  for (const Use use : uses) {
    for (const bool by_hook : {false, true}) {
      for (const bool ignored : {false, true}) {
        CAPTURE(by_hook);
        CAPTURE(ignored);
        Chat* current = nullptr;
        bool misuse = false;
        int refused = 0;
        const auto work = [&] {
          if (!misuse) return;
          try {
            use(*current);
          } catch (const Error& error) {
            if (error.code() == ErrorCode::invalid_argument) ++refused;
            if (!ignored) throw;
          }
        };
        ChatOptions options = greedy();
        if (by_hook) {
          options.generate.on_logits = [&](int, qwenport::EditableLogits, const auto&) { work(); };
        }
        Chat chat(stage.engine, options);
        current = &chat;
        chat.send("hi");
        misuse = true;
        CHECK_THROWS_WITH_AS(chat.send("other",
                                       [&](std::string_view) {
                                         if (!by_hook) work();
                                       }),
                             "a callback must not use its chat", Error);
        CHECK(refused == 1);
        misuse = false;
        check_like_new(chat, stage.engine, options, {"hi"});
      }
    }
  }
}

TEST_CASE("a callback may read the history, which has not changed yet, and use another chat") {
  Stage stage;
  Chat chat(stage.engine, greedy());
  Chat other(stage.engine, greedy());
  const auto reply = chat.send("hi", [&](std::string_view) {
    CHECK(chat.history().empty());
    other.send("hi");
    other.reset();
  });
  CHECK(other.send("hi").text == reply.text);
}

TEST_CASE("a chat that a callback moves or destroys lives until its reply has ended") {
  Stage stage;
  auto chat = std::make_unique<Chat>(stage.engine, greedy());
  const std::string expected = chat->send("hi").text;
  chat->reset();
  CHECK(chat->send("hi", [&](std::string_view) { chat.reset(); }).text == expected);
  chat = std::make_unique<Chat>(stage.engine, greedy());
  CHECK(chat->send("hi", [&](std::string_view) { *chat = Chat(stage.engine); }).text == expected);
  CHECK(chat->history().empty());
}

TEST_CASE("a chat that was moved from is refused") {
  Stage stage;
  Chat chat(stage.engine);
  const Chat taken = std::move(chat);
  constexpr const char* message = "this chat was moved to another one; use that";
  CHECK_THROWS_WITH_AS(chat.send("x"), message, Error);        // NOLINT(bugprone-use-after-move)
  CHECK_THROWS_WITH_AS(chat.reset(), message, Error);          // NOLINT(bugprone-use-after-move)
  CHECK_THROWS_WITH_AS((void)chat.history(), message, Error);  // NOLINT(bugprone-use-after-move)
}

TEST_CASE("an error of the device passes through, and leaves the history") {
  const Stage stage;
  auto manifest = qwenport::detail::read_manifest(stage.directory.path());
  const auto shared = std::make_shared<const qwenport::detail::Manifest>(manifest);
  bool fails = false;
  const auto model = std::make_shared<const stand_in::StandInModel>(std::move(manifest), [&fails, shared] {
    return stand_in::Network(
        [&fails, shared, network = stand_in::toy_network(*shared)](const stand_in::Call& call) {
          if (fails) throw Error(ErrorCode::device, "no power");
          network(call);
        });
  });
  Chat chat(Engine(model, stage.directory.path()), greedy());
  chat.send("hi");
  const auto before = lines(chat.history());
  fails = true;
  CHECK_THROWS_WITH_AS(chat.send("x"), "no power", Error);
  fails = false;
  CHECK_THROWS_WITH_AS(chat.send("x"),
                       "an earlier step of this session failed on the device; make a new session", Error);
  CHECK(lines(chat.history()) == before);
}

TEST_CASE("the C API holds the same conversation") {
  Stage stage;
  qwenport_engine* engine = nullptr;
  REQUIRE(qwenport_engine_load(stage.directory.path().c_str(), nullptr, &engine) == 0);
  qwenport_cancellation* stop = qwenport_cancellation_create();
  const int64_t stop_tokens[] = {'y'};
  const char* const stop_strings[] = {"zz", "ab"};
  qwenport_chat_options options = qwenport_chat_defaults();
  options.system = "be";
  options.generate.stop_tokens = stop_tokens;
  options.generate.stop_token_count = 1;
  options.generate.cancellation = stop;
  options.generate.max_new_tokens = 20;
  options.generate.on_logits = [](void* user, int, float* logits, size_t vocab, const int64_t* drawn,
                                  size_t count) {
    const std::vector<qwenport::Token> tokens(drawn, drawn + count);
    static_cast<Stage*>(user)->script.hook()(0, {logits, vocab}, tokens);
  };
  options.stop_strings = stop_strings;
  options.stop_string_count = 2;
  options.session.capacity = 50;
  qwenport_chat* chat = nullptr;
  REQUIRE(qwenport_chat_create(engine, &options, &chat) == 0);
  qwenport_engine_free(engine);

  static std::string streamed;
  streamed.clear();
  const auto print = [](void* user, const char* text, size_t bytes) {
    CHECK(user != nullptr);
    streamed.append(text, bytes);
  };
  qwenport_reply reply{};
  stage.script.next = {'h', 'i', 256};
  REQUIRE(qwenport_chat_send(chat, "q", 1, print, &stage, &reply) == 0);
  CHECK(std::string(reply.text) == "hi");
  CHECK(streamed == "hi");
  CHECK(reply.bytes == 2);
  CHECK(reply.reason == QWENPORT_FINISH_STOP);
  CHECK(reply.stop_string == 1);
  CHECK(reply.prompt_tokens == static_cast<int>(stage.encode("<|x|>s be<|x|>u q<|x|>a ").size()));
  CHECK(reply.new_tokens == 3);
  CHECK(reply.dropped == 0);
  const qwenport_message* messages = nullptr;
  size_t count = 0;
  REQUIRE(qwenport_chat_history(chat, &messages, &count) == 0);
  REQUIRE(count == 2);
  CHECK(std::string(messages[0].role) == "user");
  CHECK(std::string(messages[0].content, messages[0].bytes) == "q");
  CHECK(std::string(messages[1].content, messages[1].bytes) == "hi");

  qwenport_cancellation_request(stop);
  REQUIRE(qwenport_chat_send(chat, nullptr, 0, nullptr, &stage, &reply) == 0);
  CHECK(reply.reason == QWENPORT_FINISH_CANCELLED);
  qwenport_cancellation_reset(stop);
  stage.script.next = {'k', 'y'};
  REQUIRE(qwenport_chat_send(chat, "", 0, print, &stage, nullptr) == 0);
  CHECK(streamed == "hik");
  CHECK(qwenport_chat_send(chat, std::string(50, 'q').c_str(), 50, nullptr, &stage, &reply) ==
        QWENPORT_CAPACITY);
  REQUIRE(qwenport_chat_reset(chat) == 0);
  REQUIRE(qwenport_chat_history(chat, &messages, &count) == 0);
  CHECK(count == 0);

  const auto send = [](void* user, const char*, size_t) {
    auto* own = static_cast<qwenport_chat*>(user);
    CHECK(qwenport_chat_send(own, "q", 1, nullptr, nullptr, nullptr) == QWENPORT_INVALID_ARGUMENT);
    CHECK(std::string(qwenport_last_error()) == "a callback must not use its chat");
  };
  qwenport_chat* plain = nullptr;
  REQUIRE(qwenport_engine_load(stage.directory.path().c_str(), nullptr, &engine) == 0);
  REQUIRE(qwenport_chat_create(engine, nullptr, &plain) == 0);
  CHECK(qwenport_chat_send(plain, "q", 1, send, plain, &reply) == QWENPORT_INVALID_ARGUMENT);
  CHECK(qwenport_chat_send(plain, "q", 1, nullptr, nullptr, nullptr) == 0);

  const auto refused = [](int code, const char* message) {
    CHECK(code == QWENPORT_INVALID_ARGUMENT);
    CHECK(std::string(qwenport_last_error()) == message);
  };
  refused(qwenport_chat_create(nullptr, nullptr, &chat), "engine is NULL");
  refused(qwenport_chat_create(engine, nullptr, nullptr), "chat is NULL");
  options = qwenport_chat_defaults();
  options.stop_string_count = 1;
  refused(qwenport_chat_create(engine, &options, &plain), "options.stop_strings is NULL");
  const char* const nothing[] = {nullptr};
  options.stop_strings = nothing;
  refused(qwenport_chat_create(engine, &options, &plain), "options.stop_strings[0] is NULL");
  options = qwenport_chat_defaults();
  options.generate.stop_token_count = 1;
  refused(qwenport_chat_create(engine, &options, &plain), "options.stop_tokens is NULL");
  refused(qwenport_chat_send(nullptr, "q", 1, nullptr, nullptr, nullptr), "chat is NULL");
  refused(qwenport_chat_send(plain, nullptr, 1, nullptr, nullptr, nullptr), "content is NULL");
  refused(qwenport_chat_history(nullptr, &messages, &count), "chat is NULL");
  refused(qwenport_chat_history(plain, nullptr, &count), "messages is NULL");
  refused(qwenport_chat_history(plain, &messages, nullptr), "count is NULL");
  refused(qwenport_chat_reset(nullptr), "chat is NULL");
  qwenport_engine_free(engine);
  qwenport_chat_free(plain);
  qwenport_chat_free(chat);
  qwenport_chat_free(nullptr);
  qwenport_cancellation_reset(nullptr);
  qwenport_cancellation_free(stop);
}
