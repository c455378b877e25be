// The weights of a DeepSeek-V4 model as the ops take them: views into the checkpoint's memory map wherever the stored form
// can be used directly. Copied are only small things: norms and biases (to binary32), block scales (to binary32), MXFP4
// scales (to ue4m3, lossless), hash tables (to int32), and wo_a groups whose FP8 blocks straddle two groups.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "ops/cpu_context.h"
#include "ops/gemm/weight.h"
#include "ops/hyper_connection/hyper_connection.h"
#include "ops/moe/moe.h"
#include "ops/rope/rope.h"

namespace dsv4 {

struct HcWeights {
  std::vector<float> fn, scale, base;
  HcParams params() const { return {fn.data(), scale.data(), base.data()}; }
};

struct CompressorWeights {
  Weight wkv;               // [width, hidden]
  Weight wgate;             // [width, hidden]
  std::vector<float> ape;   // [ratio, width]
  std::vector<float> norm;  // [dim]
};

struct IndexerWeights {
  Weight wq_b;          // [index_num_heads * index_head_dim, q_lora_rank]
  Weight weights_proj;  // [index_num_heads, hidden]
  CompressorWeights compressor;
};

struct AttentionWeights {
  Weight wq_a;               // [q_lora_rank, hidden]
  Weight wq_b;               // [num_heads * head_dim, q_lora_rank]
  Weight wkv;                // [head_dim, hidden]
  std::vector<Weight> wo_a;  // [o_groups] of [o_lora_rank, num_heads / o_groups * head_dim]
  Weight wo_b;               // [hidden, o_groups * o_lora_rank]
  std::vector<float> q_norm, kv_norm;
  std::vector<float> sink_logit;                  // [num_heads]
  std::unique_ptr<CompressorWeights> compressor;  // CSA, HCA
  std::unique_ptr<IndexerWeights> indexer;        // CSA
};

struct FfnWeights {
  Weight gate;                      // [num_experts, hidden]
  std::vector<float> gate_bias;     // [num_experts], score-routed layers
  std::vector<int32_t> hash_table;  // [vocab, num_topk], hash layers
  std::vector<ExpertWeights> experts;
  std::unique_ptr<ExpertWeights> shared;
};

struct LayerWeights {
  HcWeights hc_attn, hc_ffn;
  std::vector<float> attn_norm, ffn_norm;  // [hidden]
  AttentionWeights attn;
  FfnWeights ffn;
};

struct ModelWeights {
  Weight embed;  // [vocab, hidden] F32 or BF16
  Weight head;   // [vocab, hidden]
  HcWeights hc_head;
  std::vector<float> norm;  // [hidden]
  std::vector<LayerWeights> layers;
  RopeFreqs window_rope;                           // ratio-0 layers
  RopeFreqs compress_rope;                         // layers with compression
  std::vector<std::unique_ptr<HostBuffer>> owned;  // scales that had to be converted
};

// Every matrix of the model, in the order a step reads them.
std::vector<Weight*> all_matrices(ModelWeights& weights);

// Throws bad input naming the tensor. The checkpoint must outlive the result.
ModelWeights load_weights(const Checkpoint& checkpoint, const CpuContext& context);

}  // namespace dsv4
