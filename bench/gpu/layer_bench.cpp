// The fused kernels of a layer: rope_norm_insert, gather_kv_rows, compress_quantize, hyper_connection_boundary.
#include <random>

#include "gpu_bench.h"
#include "ops/compressor/compressor_gpu.h"
#include "ops/hyper_connection/hyper_connection_gpu.h"
#include "ops/quantize/quantize_gpu.h"
#include "ops/rope/rope_gpu.h"

using namespace dsv4;

namespace {

gpu::DeviceBuffer ints(const bench::Bench& b, int64_t count, int (*value)(int64_t)) {
  std::vector<int32_t> host(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) host[i] = value(i);
  gpu::DeviceBuffer buffer(count * 4);
  gpu::copy_to_device(buffer.data(), host.data(), count * 4, b.context().stream);
  DSV4_CUDA(cudaStreamSynchronize(b.context().stream));
  return buffer;
}

const char* format_name(KvFormat format) {
  return format == KvFormat::kBf16 ? "bf16" : format == KvFormat::kFp8 ? "fp8" : "nvfp4";
}

DevicePages make_pages(const gpu::DeviceBuffer& buffer, PageLayout layout, int rows_per_page, int32_t num_rows) {
  return {buffer.as<uint8_t>(), (int64_t{rows_per_page} * (layout.data_bytes + layout.scale_bytes) + 15) / 16 * 16,
          rows_per_page, num_rows};
}

void bench_rope_norm_insert(bench::Bench& b) {
  constexpr int kHeads = 64;
  constexpr int64_t kMost = 4096;
  const GpuContext c = b.context();
  gpu::DeviceBuffer q(kMost * kHeads * 1024), q_out(kMost * kHeads * 1024), kv(kMost * 1024), weight(1024),
      table(4096 * 256), cache(int64_t{64} << 20);
  bench::fill_random_bf16(q.data(), q.bytes() / 2, 1, c.stream);
  bench::fill_random_bf16(kv.data(), kv.bytes() / 2, 2, c.stream);
  bench::fill_random_bf16(weight.data(), 512, 3, c.stream);
  bench::fill_random_f32(table.data(), table.bytes() / 4, 4, c.stream);
  const gpu::DeviceBuffer rows = ints(b, kMost, [](int64_t i) { return static_cast<int>(i % 4096); });
  for (const KvFormat format : {KvFormat::kBf16, KvFormat::kFp8, KvFormat::kNvfp4}) {
    const PageLayout layout = kv_page_layout(format);
    const DevicePages pages = make_pages(cache, layout, 64, 32768);
    const auto run = [&, pages](const GpuContext& context, int64_t tokens, int64_t first) {
      rope_norm_insert({q.as<bf16>() + first * kHeads * 512, q_out.as<bf16>() + first * kHeads * 512,
                        kv.as<bf16>() + first * 512, 512, weight.as<bf16>(), table.as<float>(),
                        rows.as<int32_t>() + first, rows.as<int32_t>() + first, pages, format, tokens, kHeads, 1e-6f},
                       context);
    };
    const double row_bytes = layout.data_bytes + layout.scale_bytes;
    for (const int64_t tokens : {int64_t{1024}, kMost})
      b.stream("rope_norm_insert", std::to_string(tokens) + " tokens x64 heads, kv " + format_name(format),
               static_cast<double>(tokens) * (2.0 * kHeads * 1024 + 1024 + row_bytes + 256), "copy",
               static_cast<int>(kMost / tokens) * 2,
               [&](const GpuContext& context, int i) { run(context, tokens, i * tokens % kMost); });
    if (format == KvFormat::kNvfp4)
      for (const int64_t tokens : {1, 8, 64})
        b.latency("rope_norm_insert", std::to_string(tokens) + " tokens x64 heads, kv nvfp4",
                  [&](const GpuContext& context, int) { run(context, tokens, 0); });
  }
}

void bench_gather(bench::Bench& b) {
  constexpr int32_t kPool = 1 << 20;
  constexpr int64_t kOut = 128 * 512;
  const GpuContext c = b.context();
  gpu::DeviceBuffer cache(int64_t{1024} * kPool + (1 << 20)), y(4 * kOut * 1024);
  bench::fill_random_sf(cache.data(), cache.bytes(), 1, c.stream);
  std::mt19937 random(3);
  std::vector<int32_t> host(4 * kOut);
  for (int32_t& row : host) row = static_cast<int32_t>(random() % kPool);
  gpu::DeviceBuffer rows(4 * kOut * 4);
  gpu::copy_to_device(rows.data(), host.data(), rows.bytes(), c.stream);
  for (const KvFormat format : {KvFormat::kBf16, KvFormat::kFp8, KvFormat::kNvfp4}) {
    const PageLayout layout = kv_page_layout(format);
    const DevicePages pages = make_pages(cache, layout, 64, kPool);
    b.stream(
        "gather_kv_rows", std::string("512 of 1M rows x128, ") + format_name(format),
        static_cast<double>(kOut) * (layout.data_bytes + layout.scale_bytes + 1024 + 4), "copy", 4,
        [&](const GpuContext& context, int i) {
          gather_kv_rows({pages, format, rows.as<int32_t>() + i * kOut, y.as<bf16>() + i * kOut * 512, kOut}, context);
        });
  }
}

void bench_compress(bench::Bench& b) {
  const GpuContext c = b.context();
  struct Case {
    CompressorKind kind;
    const char* name;
  };
  for (const Case& kase : {Case{CompressorKind::kCsa, "csa"}, Case{CompressorKind::kHca, "hca"},
                           Case{CompressorKind::kIndexer, "indexer"}}) {
    const CompressorTraits traits = compressor_traits(kase.kind);
    constexpr int64_t kStates = 256, kTokens = 8192;
    gpu::DeviceBuffer value(kTokens * traits.width * 4), gate(kTokens * traits.width * 4),
        ape(int64_t{traits.ratio} * traits.width * 4), norm(traits.dim * 2), table(4096 * 256);
    gpu::DeviceBuffer state_value(kStates * traits.state_rows * traits.width * 4), state_gate(state_value.bytes()),
        cache(int64_t{16} << 20);
    bench::fill_random_f32(value.data(), value.bytes() / 4, 1, c.stream);
    bench::fill_random_f32(gate.data(), gate.bytes() / 4, 2, c.stream);
    bench::fill_random_f32(ape.data(), ape.bytes() / 4, 3, c.stream);
    bench::fill_random_bf16(norm.data(), traits.dim, 4, c.stream);
    bench::fill_random_f32(table.data(), table.bytes() / 4, 5, c.stream);
    bench::fill_random_f32(state_value.data(), state_value.bytes() / 4, 6, c.stream);
    bench::fill_random_f32(state_gate.data(), state_gate.bytes() / 4, 7, c.stream);
    const gpu::DeviceBuffer index = ints(b, 4096, [](int64_t i) { return static_cast<int>(i % 4096); });
    const gpu::DeviceBuffer all_emit = ints(b, kStates, [](int64_t) { return 1023; }),
                            none_emit = ints(b, kStates, [](int64_t) { return 1021; });
    const gpu::DeviceBuffer mixed = ints(b, kStates, [](int64_t i) { return 1024 + static_cast<int>(i) * 37; });
    const PageLayout layout =
        kase.kind == CompressorKind::kIndexer ? index_page_layout(IndexFormat::kFp4) : kv_page_layout(KvFormat::kNvfp4);
    const DevicePages pages = make_pages(cache, layout, 64, 4096);
    const CompressCommon common{
        kase.kind,         value.as<float>(),       gate.as<float>(),       ape.as<float>(), norm.as<bf16>(),
        table.as<float>(), state_value.as<float>(), state_gate.as<float>(), 1e-6f,           pages,
        KvFormat::kNvfp4,  IndexFormat::kFp4};
    struct Step {
      const gpu::DeviceBuffer& positions;
      const char* name;
    };
    for (const int64_t tokens : {1, 8, 128})
      for (const Step& step : {Step{none_emit, "no window completes"}, Step{all_emit, "every token completes one"},
                               Step{mixed, "mixed phases"}}) {
        if (tokens == 1 && &step.positions == &mixed) continue;
        b.latency("compress_quantize decode",
                  std::string(kase.name) + ", " + std::to_string(tokens) + " sequences, " + step.name,
                  [&](const GpuContext& context, int i) {
                    // Neighbouring calls work on different sequences, as the contract asks (and layers do).
                    const int32_t* own = index.as<int32_t>() + i % 2 * (kStates / 2);
                    compress_quantize(CompressDecodeArgs{common, step.positions.as<int32_t>(), own, own, own, tokens},
                                      context);
                  });
      }
    const double row_bytes = layout.data_bytes + layout.scale_bytes;
    b.stream(
        "compress_quantize prefill", std::string(kase.name) + ", 8192 tokens",
        static_cast<double>(kTokens) * traits.width * 8 + static_cast<double>(kTokens / traits.ratio) * row_bytes,
        "copy", 2, [&](const GpuContext& context, int) {
          compress_quantize(CompressPrefillArgs{common, 0, kTokens, index.as<int32_t>(), index.as<int32_t>()}, context);
        });
  }
}

void bench_hyper_connection(bench::Bench& b) {
  const GpuContext c = b.context();
  for (const int64_t hidden : {int64_t{4096}, int64_t{7168}}) {
    const int64_t most = 4096;
    gpu::DeviceBuffer streams(most * 4 * hidden * 2), streams_out(streams.bytes()), sublayer(most * hidden * 2),
        weight(hidden * 2), post(most * 16), comb(most * 64), post_out(most * 16), comb_out(most * 64),
        fn(24 * 4 * hidden * 4), scale(16), base(96), codes(most * hidden), sf(most * hidden / 16),
        y(most * hidden * 2), global(most * 4);
    bench::fill_random_bf16(streams.data(), streams.bytes() / 2, 1, c.stream);
    bench::fill_random_bf16(sublayer.data(), sublayer.bytes() / 2, 2, c.stream);
    bench::fill_random_bf16(weight.data(), hidden, 3, c.stream);
    for (gpu::DeviceBuffer* buffer : {&post, &comb, &fn, &scale, &base})
      bench::fill_random_f32(buffer->data(), buffer->bytes() / 4, 4, c.stream);
    const auto run = [&](const GpuContext& context, int64_t tokens, RowFormat format, bool head, int iterations = 20) {
      QuantizedRows out{.format = format,
                        .global_mode = format == RowFormat::kNvfp4 ? GlobalMode::kComputeRow : GlobalMode::kOne,
                        .codes = codes.as<uint8_t>(),
                        .sf = sf.as<uint8_t>(),
                        .y = y.as<bf16>(),
                        .row_global = global.as<float>()};
      hyper_connection_boundary(
          {streams.as<bf16>(), sublayer.as<bf16>(), post.as<float>(), comb.as<float>(), streams_out.as<bf16>(),
           fn.as<float>(), scale.as<float>(), base.as<float>(), post_out.as<float>(), comb_out.as<float>(), head,
           weight.as<bf16>(), out, tokens, hidden, iterations, 1e-6f, 1e-6f},
          context);
    };
    for (const int64_t tokens : {1, 2, 4, 8, 16, 64}) {
      b.latency("hyper_connection_boundary",
                "hidden " + std::to_string(hidden) + ", " + std::to_string(tokens) + " tokens, bf16",
                [&](const GpuContext& context, int) { run(context, tokens, RowFormat::kBf16, false); });
      if (tokens == 8)
        b.latency("hyper_connection_boundary", "hidden " + std::to_string(hidden) + ", 8 tokens, bf16 + nvfp4",
                  [&](const GpuContext& context, int) { run(context, tokens, RowFormat::kNvfp4, false); });
    }
    b.latency("hyper_connection_boundary", "hidden " + std::to_string(hidden) + ", 1 token, one Sinkhorn iteration",
              [&](const GpuContext& context, int) { run(context, 1, RowFormat::kBf16, false, 1); });
    b.latency("hyper_connection head", "hidden " + std::to_string(hidden) + ", 8 tokens",
              [&](const GpuContext& context, int) { run(context, 8, RowFormat::kBf16, true); });
    b.stream("hyper_connection_boundary", "hidden " + std::to_string(hidden) + ", 4096 tokens, bf16",
             static_cast<double>(most) * hidden * 2 * (4 + 1 + 4 + 1), "copy", 2,
             [&](const GpuContext& context, int) { run(context, most, RowFormat::kBf16, false); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run(argc, argv, [](bench::Bench& b) {
    bench_rope_norm_insert(b);
    bench_gather(b);
    bench_compress(b);
    bench_hyper_connection(b);
  });
}
