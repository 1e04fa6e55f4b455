// Conversations on the toy network, whose logits tell all that the cache holds.
#include <doctest/doctest.h>

#include <algorithm>
#include <thread>

#include "chat_script.hpp"
#include "qwenport/chat.hpp"

namespace {

using qwenport::Chat;
using qwenport::ChatOptions;
using qwenport::Error;
using qwenport::ErrorCode;
using qwenport::FinishReason;
using qwenport::Reply;
using qwenport::Session;
using qwenport::Token;
using stand_in::lines;
using stand_in::small_stop;
using stand_in::Stage;
using Tokens = std::vector<Token>;
using Lines = std::vector<std::string>;

Tokens operator+(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// The code of the Error that work throws.
template <typename Work>
int refused(const Work& work, std::string* message = nullptr) {
  try {
    work();
  } catch (const Error& error) {
    if (message != nullptr) *message = error.what();
    return static_cast<int>(error.code());
  }
  return 0;
}

constexpr int no_room = static_cast<int>(ErrorCode::capacity);
constexpr int invalid = static_cast<int>(ErrorCode::invalid_argument);

}  // namespace

TEST_CASE("each reply is what follows the whole conversation, and no token of it is computed twice") {
  Stage stage;
  ChatOptions options;
  options.generate.max_new_tokens = 5;
  options.generate.temperature = 0.9;
  options.generate.on_logits = [](int, qwenport::EditableLogits logits, const Tokens&) {
    for (std::size_t id = 0; id < logits.size(); ++id) {  // letters that no merge takes, or a stop
      if ((id < 'k' || id > 'p') && id != small_stop) logits[id] = -std::numeric_limits<float>::infinity();
    }
  };
  std::array<int, 2> reasons{};
  options.generate.seed = ~std::uint64_t{0};  // that of the second reply is 0
  Chat chat(stage.engine, options);
  for (int round = 0; round < 2; ++round) {
    Tokens said;
    Lines conversation;
    int held_back = 0;
    for (std::uint64_t n = 0; n < 4; ++n) {
      const Tokens turn = stage.encode("<|x|>u hi<|x|>a ");
      qwenport::GenerateOptions plain = options.generate;
      plain.seed += n;
      plain.stop_tokens = {small_stop};
      Session session(stage.engine);
      const auto expected = session.generate(said + turn, plain);
      std::string streamed;
      const Reply reply = chat.send(" hi\n", [&](std::string_view piece) {
        CHECK(!piece.empty());
        streamed += piece;
      });
      CHECK(reply.text == stage.tokenizer.decode(expected.tokens));
      CHECK(streamed == reply.text);
      CHECK(reply.reason == expected.reason);
      CHECK(reply.new_tokens == static_cast<int>(expected.tokens.size()));
      CHECK(reply.prompt_tokens == held_back + static_cast<int>(turn.size()));
      CHECK(reply.stop_string == -1);
      CHECK(reply.dropped == 0);
      ++reasons.at(static_cast<std::size_t>(reply.reason));
      held_back = expected.stop_token < 0 ? 1 : 0;
      said = said + turn + expected.tokens;
      conversation.insert(conversation.end(), {"user:  hi\n", "assistant: " + reply.text});
      CHECK(lines(chat.history()) == conversation);
    }
    chat.reset();
    CHECK(chat.history().empty());
  }
  CHECK(reasons.at(0) > 0);
  CHECK(reasons.at(1) > 0);
}

TEST_CASE("the system message begins the conversation and stays") {
  Stage stage;
  ChatOptions options = stage.scripted();
  options.system = "be\xFF";
  Chat chat(stage.engine, options);
  for (int round = 0; round < 2; ++round) {
    CHECK(chat.history().empty());
    stage.script.next = {'y'};
    chat.send("\xFF");
    CHECK(stage.script.followed(stage.engine, stage.encode("<|x|>s be\uFFFD<|x|>u \uFFFD<|x|>a ")));
    CHECK(lines(chat.history()) == Lines{"user: \uFFFD", "assistant: y"});
    chat.reset();
  }
}

TEST_CASE("a reply that the template writes in another way is made anew from its text") {
  Stage stage;
  Chat chat(stage.engine, stage.scripted());
  stage.script.next = stage.encode("t</think>\n\nab");
  CHECK(chat.send("q").text == "t</think>\n\nab");
  stage.script.next = {'r', 'x'};
  const Reply reply = chat.send("q");
  CHECK(stage.script.followed(stage.engine, stage.encode("<|x|>u q<|x|>a ab<|x|>u q<|x|>a ")));
  CHECK(reply.prompt_tokens == 8);  // "ab" and the turn; what comes before it was there
  CHECK(chat.send("q").prompt_tokens == 7);
  CHECK(
      stage.script.followed(stage.engine, stage.encode("<|x|>u q<|x|>a ab<|x|>u q<|x|>a rx<|x|>u q<|x|>a ")));
}

TEST_CASE("a reply that the template treats in a way of its own ends the conversation") {
  Stage stage;
  Chat chat(stage.engine, stage.scripted());
  stage.script.next = stage.encode("x<call>");
  CHECK(chat.send("q").text == "x<call>");
  std::string message;
  CHECK(refused([&] { chat.send("q"); }, &message) == invalid);
  CHECK(message.find("of role \"assistant\" contains \"<call>\"") != std::string::npos);
  CHECK(chat.history().size() == 2);
  chat.reset();
  CHECK(chat.send("q").prompt_tokens == 7);
}

TEST_CASE("tokens that are not those of their text are fed anew") {
  Stage stage;
  Chat chat(stage.engine, stage.scripted());
  stage.script.next = {'k', 'a', 'b', 0xC3};
  CHECK(chat.send("q").text == "kab\uFFFD");
  const Reply reply = chat.send("q");
  const Tokens prompt = stage.encode("<|x|>u q<|x|>a kab\uFFFD<|x|>u q<|x|>a ");
  CHECK(stage.script.followed(stage.engine, prompt));
  CHECK(reply.prompt_tokens == static_cast<int>(prompt.size()) - 8);  // "<|x|>u q<|x|>a k" was there
}

TEST_CASE("a stop string ends a reply; what was drawn of it leaves the conversation") {
  Stage stage;
  const Tokens turn = stage.encode("<|x|>u q<|x|>a ");
  ChatOptions options = stage.scripted();
  options.stop_strings = {"zz", "ab", "b!"};
  Chat chat(stage.engine, options);

  stage.script.next = {'h', 'i', 256, 'x'};
  std::string streamed;
  Reply reply = chat.send("q", [&](std::string_view piece) { streamed += piece; });
  CHECK(reply.text == "hi");
  CHECK(streamed == "hi");
  CHECK(reply.reason == FinishReason::stop);
  CHECK(reply.stop_string == 1);
  CHECK(reply.new_tokens == 3);
  stage.script.next = {'a', 'z'};  // both could be beginnings
  reply = chat.send("q");
  CHECK(stage.script.followed(stage.engine, turn + Tokens{'h', 'i'} + turn));
  CHECK(reply.prompt_tokens == 7);
  CHECK(reply.text == "az");
  CHECK(reply.stop_string == -1);
  CHECK(reply.reason == FinishReason::stop);

  chat.reset();
  stage.script.next = {'c', 257};  // "cabc": a stop string in the middle of a token
  CHECK(chat.send("q").text == "c");
  chat.reset();
  options.stop_strings = {"b"};
  Chat other(stage.engine, options);
  CHECK(other.send("q").text == "ca");
  other.send("q");
  CHECK(stage.script.followed(stage.engine, stage.encode("<|x|>u q<|x|>a ca<|x|>u q<|x|>a ")));
}

TEST_CASE("the text of a stop token is not searched, and stop tokens of the options count too") {
  Stage stage;
  ChatOptions options = stage.scripted();
  options.stop_strings = {"x", "|"};
  options.generate.stop_tokens = {'y'};
  Chat chat(stage.engine, options);
  stage.script.next = {'k'};
  Reply reply = chat.send("q");
  CHECK(reply.text == "k");
  CHECK(reply.stop_string == -1);
  stage.script.next = {'k', 'y', 'k'};
  reply = chat.send("q");
  CHECK(reply.text == "k");
  CHECK(reply.new_tokens == 1);
  CHECK(reply.reason == FinishReason::stop);
}

TEST_CASE("stop strings see tokens that a stop sequence has held back") {
  Stage stage;
  ChatOptions options = stage.scripted();
  options.generate.stop_sequences = {{'a', 'b', 'c'}};
  options.stop_strings = {"a"};
  Chat chat(stage.engine, options);
  for (const Tokens& next : {Tokens{'k', 'a', 'b', 'x', 'y'}, Tokens{'k', 'a', 'b'}, Tokens{'k', 'a'}}) {
    stage.script.next = next;
    const Reply reply = chat.send("q");
    CHECK(reply.text == "k");
    CHECK(reply.stop_string == 0);
    CHECK(reply.reason == FinishReason::stop);
    chat.reset();
  }
  stage.script.next = {'k', 'a', 'b', 'c', 'x'};
  const Reply reply = chat.send("q");
  CHECK(reply.text == "k");
  CHECK(reply.stop_string == -1);
  chat.send("q");
  const Tokens turn = stage.encode("<|x|>u q<|x|>a ");
  CHECK(stage.script.followed(stage.engine, turn + Tokens{'k'} + turn));
}

TEST_CASE("a conversation without room is refused and stays as it is") {
  Stage stage;
  ChatOptions options = stage.scripted();
  options.session.capacity = 20;
  Chat chat(stage.engine, options);
  stage.script.next = {'1', '2', '3', '4', '5'};
  CHECK(chat.send("q").reason == FinishReason::stop);  // 12 tokens, of which the cache has all
  const auto before = lines(chat.history());
  std::string message;
  CHECK(refused(
            [&] {
              chat.send("12");
              chat.send(std::string(3, 'q'));
            },
            &message) == no_room);
  CHECK(message ==
        "the conversation has 30 tokens, the cache room for 20: reset the chat, or let it drop its oldest "
        "turns");
  CHECK(lines(chat.history()).size() == before.size() + 2);
  chat.reset();
  stage.script.next = Tokens(20, '1');
  const Reply last = chat.send(std::string(14, 'q'));  // a prompt of 20 tokens has room for one more
  CHECK(last.text == "1");
  CHECK(last.reason == FinishReason::capacity);
  chat.reset();
  CHECK(refused([&] { chat.send(std::string(15, 'q')); }, &message) == no_room);
  CHECK(message == "the conversation has 21 tokens, the cache room for 20: the message is too long");
  CHECK(chat.history().empty());
}

TEST_CASE("the oldest turns leave a conversation that has little room") {
  Stage stage;
  ChatOptions options = stage.scripted();
  options.session.capacity = 40;
  options.generate.max_new_tokens = 9;
  options.drop_oldest = true;
  options.system = "be";
  Chat chat(stage.engine, options);
  Lines all;
  std::vector<int> dropped;
  stage.script.next = {'o', 'k'};
  for (int n = 0; n < 12; ++n) {
    const std::string content = std::string(static_cast<std::size_t>(1 + n % 4), 'q');
    const Reply reply = chat.send(content);
    all.erase(all.begin(), all.begin() + 2 * reply.dropped);
    all.insert(all.end(), {"user: " + content, "assistant: ok"});
    CHECK(lines(chat.history()) == all);
    std::vector<qwenport::Message> messages{{"system", "be"}};
    messages.insert(messages.end(), chat.history().begin(), chat.history().end() - 1);
    const Tokens prompt = stage.encode(stage.format.text(messages));
    CHECK(stage.script.followed(stage.engine, prompt));
    CHECK(40 - static_cast<int>(prompt.size()) + 1 >= 9);
    dropped.push_back(reply.dropped);
  }
  CHECK(std::count(dropped.begin(), dropped.end(), 0) >= 2);
  CHECK(*std::max_element(dropped.begin(), dropped.end()) > 0);

  const auto before = lines(chat.history());
  std::string message;
  CHECK(refused([&] { chat.send(std::string(40, 'q')); }, &message) == no_room);
  CHECK(message == "the conversation has 51 tokens, the cache room for 40: the message is too long");
  CHECK(lines(chat.history()) == before);
  const Reply reply = chat.send(std::string(28, 'q'));  // has no room for 9, but for some
  CHECK(reply.text == "ok");
  CHECK(lines(chat.history()) == Lines{"user: " + std::string(28, 'q'), "assistant: ok"});
  const int there =
      8 + static_cast<int>(before[0].size() - std::string("user: ").size());  // "<|x|>s be<|x|>u qq"
  CHECK(reply.prompt_tokens == 39 - there);
}

TEST_CASE("half of the capacity is room enough for a reply without a limit") {
  Stage stage;
  ChatOptions options = stage.scripted();
  options.session.capacity = 40;
  options.drop_oldest = true;
  Chat chat(stage.engine, options);
  stage.script.next = Tokens(5, 'k');
  CHECK(chat.send("1234").dropped == 0);  // 15 tokens with the reply
  CHECK(chat.send("").dropped == 0);      // the prompt has 21: room for 20
  chat.reset();
  CHECK(chat.send("1234").dropped == 0);
  CHECK(chat.send("1").dropped == 1);
}

TEST_CASE("a cancelled reply is part of the conversation as far as it goes") {
  Stage stage;
  qwenport::Cancellation stop;
  ChatOptions options = stage.scripted();
  options.generate.cancellation = &stop;
  Chat chat(stage.engine, options);
  const Tokens turn = stage.encode("<|x|>u q<|x|>a ");
  stage.script.next = {'1', '2', '3', '4'};
  Reply reply = chat.send("q", [&](std::string_view piece) {
    if (piece == "2") stop.request();
  });
  CHECK(reply.text == "12");
  CHECK(reply.reason == FinishReason::cancelled);
  CHECK(lines(chat.history()) == Lines{"user: q", "assistant: 12"});

  reply = chat.send("q");  // still requested: nothing is computed
  CHECK(reply.text.empty());
  CHECK(reply.reason == FinishReason::cancelled);
  CHECK(lines(chat.history()).size() == 4);

  stop.reset();
  reply = chat.send("q");
  CHECK(reply.text == "1234");
  CHECK(stage.script.followed(stage.engine, turn + Tokens{'1', '2'} + turn + turn));
  CHECK(reply.prompt_tokens == 15);  // what was never computed: "2" and two turns
}

TEST_CASE("two chats of one engine, on two threads") {
  Stage stage;
  std::array<Lines, 2> found;
  std::vector<std::thread> threads;
  for (Lines& one : found) {
    threads.emplace_back([&stage, &one] {
      ChatOptions options;
      options.generate.max_new_tokens = 4;
      options.drop_oldest = true;
      Chat chat(stage.engine, options);
      for (int n = 0; n < 8; ++n) chat.send("hi");
      one = lines(chat.history());
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(found[0] == found[1]);
}

TEST_CASE("what cannot be a chat is refused") {
  Stage stage;
  std::string message;
  const auto made = [&](ChatOptions options) {
    return refused([&] { const Chat chat(stage.engine, options); }, &message);
  };
  ChatOptions options;
  options.stop_strings = {"a", ""};
  CHECK(made(options) == invalid);
  CHECK(message == "stop string 1 is empty");
  options = {};
  options.session.max_batch = 2;
  CHECK(made(options) == invalid);
  CHECK(message == "a chat is a session of 1 row, got 2");
  options = {};
  options.system = "be!";
  CHECK(made(options) == invalid);
  options = {};
  options.session.capacity = 65;
  CHECK(made(options) == invalid);

  Chat chat(stage.engine);
  CHECK(refused([&] { chat.send("<tool>"); }) == invalid);
  CHECK(chat.history().empty());
  chat.send("q");
  CHECK(refused([&] { chat.send("<tool>"); }) == invalid);
  CHECK(chat.history().size() == 2);
  options = {};
  options.generate.temperature = -1;
  Chat impossible(stage.engine, options);
  CHECK(refused([&] { impossible.send("q"); }) == invalid);
  CHECK(impossible.history().empty());

  const stand_in::Directory no_chat(stand_in::small_tokenizer());
  CHECK(refused([&] { const Chat none(qwenport::Engine::load(no_chat.path())); }, &message) ==
        static_cast<int>(ErrorCode::bad_engine));
  CHECK(message == no_chat.path() + ": a toy has no chat template");
  const stand_in::Directory no_tokenizer("", stand_in::small_chat());
  CHECK(refused([&] { const Chat none(qwenport::Engine::load(no_tokenizer.path())); }, &message) ==
        static_cast<int>(ErrorCode::bad_engine));
  CHECK(message ==
        no_tokenizer.path() + ": no tokenizer.qwenport; `qwenport build` says why it leaves one out");
}
