// How a chat template writes conversations, as an engine's manifest has it.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "qwenport/chat.hpp"

namespace qwenport::detail {

/// Where a text lies in a content that is refused.
enum class Place { start, end, anywhere };

/// What a template does to the contents of one role.
struct ContentFormat {
  enum class Rule {
    verbatim,
    strip,                 ///< without white space at both ends, that of Python's str.strip
    after_thinking,        ///< what follows the last </think>; without one verbatim
    after_thinking_lines,  ///< the same without newlines before it
    after_thinking_strip,  ///< the same without white space at both ends
  };
  struct Refused {
    Place place = Place::start;
    std::string text;
  };

  Rule rule = Rule::verbatim;
  std::vector<Refused>
      refused;  ///< contents that the template treats in another way, before the rule or after it

  /// \param content valid UTF-8.
  [[nodiscard]] std::string_view applied(std::string_view content) const;
  /// \throws Error invalid_argument: the content is refused.
  void check(std::string_view content, const std::string& role) const;
};

/// The texts between the contents: text() puts them together.
struct ChatTemplate {
  std::optional<std::string> start_to_system;  ///< none if the template takes no system message
  std::string system_to_user;
  std::string start_to_user;
  std::string user_to_assistant;
  std::string assistant_to_user;
  std::string user_to_reply;
  ContentFormat system;
  ContentFormat user;
  ContentFormat assistant;

  /// See ChatFormat::text. \param messages of valid UTF-8.
  [[nodiscard]] std::string text(const std::vector<Message>& messages) const;
  /// The text of a system message, up to the user's first. \throws Error invalid_argument: the template does not take it.
  [[nodiscard]] std::string system_text(const std::string& content) const;
};

}  // namespace qwenport::detail
