// The flags every command shares that runs a model, and how they become EngineOptions.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "commands.h"
#include "engine/engine.h"

namespace dsv4::app {

struct ModelOptions {
  std::string folder;
  std::string backend = "auto";
  std::string act = "a16";
  std::string kv = "bf16";
  std::string index = "bf16";
  std::string isa;
  std::string repack = "auto";
  bool exact = false;
  int num_threads = 0;
  bool pin = false;
  int64_t max_chunk = 256;
};

void add_model_options(CLI::App& command, ModelOptions& options);
std::unique_ptr<Engine> open_engine(const ModelOptions& options, const GlobalOptions& global);

// Token ids from a file: safetensors with `input_ids`, or a JSON array, or numbers separated by white space.
std::vector<TokenId> read_token_file(const std::string& path);

}  // namespace dsv4::app
