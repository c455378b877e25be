// Streaming of one shard: scan for the global scale where needed, encode windows of rows on all threads, append.
#include "checkpoint/quantize/shard_encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/check.h"
#include "base/math.h"
#include "checkpoint/stored_matrix.h"
#include "codec/fp8_block.h"
#include "codec/mxfp4.h"

namespace dsv4 {
namespace {

constexpr int64_t kChunkElements = 1 << 16;
constexpr int64_t kWindowElements = 8 << 20;
constexpr uint64_t kCopyBytes = 32ull << 20;

int64_t rows_per_chunk(const StoredMatrix& matrix) {
  return std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, matrix.cols));
}
int64_t rows_per_window(const StoredMatrix& matrix, int64_t chunk_rows) {
  return chunk_rows * std::max<int64_t>(1, kWindowElements / std::max<int64_t>(1, matrix.cols * chunk_rows));
}

void require_finite(const StoredMatrix& matrix, int64_t row, const float* values) {
  if (!all_finite(values, matrix.cols))
    throw_bad_input("{}: {}: row {} holds a NaN or an infinity: it has no scale", matrix.file, matrix.name, row);
}

struct Fp8Block {
  int64_t rows, cols;  // up to 128
  int64_t stride;      // of both the weights and the codes
};

// Returns the ue8m0 scale.
uint8_t encode_fp8_weight_block(const float* w, const Fp8Block& block, uint8_t* codes, GroupLoss& loss) {
  float amax = 0.0f;
  for (int64_t r = 0; r < block.rows; ++r)
    amax = std::max(amax, group_amax(w + r * block.stride, static_cast<int>(block.cols)));
  const uint8_t scale = fp8_block_scale(amax);
  int any = 0;
  for (int64_t r = 0; r < block.rows; ++r) {
    for (int64_t k = 0; k < block.cols; ++k) {
      const float value = w[r * block.stride + k];
      const uint8_t code = encode_fp8_block_element(value, scale);
      codes[r * block.stride + k] = code;
      any |= code & 0x7f;
      const double difference = static_cast<double>(value) - decode_fp8_block_element(code, scale);
      loss.error_sq += difference * difference;
      loss.norm_sq += static_cast<double>(value) * value;
    }
  }
  loss.num_zeroed += amax > 0.0f && any == 0;
  return scale;
}

// Scale factors of a cast row: group j's exponent relative to the largest. Groups of zeros may have any exponent and do not
// count for the largest: theirs is moved into the codes that exist.
void cast_mxfp4_row(const StoredMatrix& matrix, int64_t row, int max_byte, uint8_t* sf) {
  const int64_t groups = matrix.cols / kMxfp4GroupSize;
  const auto* bytes = matrix.scale.as<uint8_t>() + row * groups;
  for (int64_t group = 0; group < groups; ++group) {
    const uint8_t code = ue4m3_power_of_two(std::clamp(bytes[group] - max_byte + 8, -9, 8));
    sf[2 * group] = code;
    sf[2 * group + 1] = code;
  }
}

}  // namespace

ShardEncoder::ShardEncoder(const Checkpoint& checkpoint, const QuantizePlan& plan, ScaleRule rule, ThreadPool& pool,
                           OnBytes on_bytes)
    : plan_(plan), rule_(rule), pool_(pool), on_bytes_(std::move(on_bytes)), pages_(checkpoint) {}

template <class Partial, class Body, class After>
Partial ShardEncoder::for_windows(const StoredMatrix& matrix, int64_t chunk_rows, const Body& body,
                                  const After& after) {
  const int64_t window_rows = rows_per_window(matrix, chunk_rows);
  std::vector<Partial> found(static_cast<size_t>(ceil_div(std::min(window_rows, matrix.rows), chunk_rows)));
  Partial sum;
  for (int64_t first = 0; first < matrix.rows; first += window_rows) {
    const int64_t last = std::min(matrix.rows, first + window_rows);
    const int64_t num_chunks = ceil_div(last - first, chunk_rows);
    pool_.parallel_for(num_chunks, [&](int64_t chunk) {
      const int64_t begin = first + chunk * chunk_rows;
      found[static_cast<size_t>(chunk)] = body(first, begin, std::min(last, begin + chunk_rows));
    });
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) sum.add(found[static_cast<size_t>(chunk)]);
    after(first, last);
  }
  return sum;
}

AmaxRange ShardEncoder::scan_amax(const MatrixJob& job) {
  const StoredMatrix& m = job.matrix;
  validate_scales(m);
  return for_windows<AmaxRange>(
      m, rows_per_chunk(m),
      [&](int64_t, int64_t begin, int64_t end) {
        std::vector<float> row(static_cast<size_t>(m.cols));
        AmaxRange range;
        for (int64_t r = begin; r < end; ++r) {
          decode_row(m, r, row.data());
          require_finite(m, r, row.data());
          range.add(group_amax_range(row.data(), m.cols / kNvfp4GroupSize));
        }
        return range;
      },
      [&](int64_t first, int64_t last) {
        if (last - first < m.rows)
          pages_.release_rows(m, first, last);  // small ones are encoded next: keep their pages
      });
}

void ShardEncoder::Mxfp4Range::add(const Mxfp4Range& other) {
  max_byte = std::max(max_byte, other.max_byte);
  min_byte = std::min(min_byte, other.min_byte);
}

ShardEncoder::Mxfp4Range ShardEncoder::scan_mxfp4(const MatrixJob& job) {
  const StoredMatrix& m = job.matrix;
  validate_scales(m);
  const int64_t groups = m.cols / kMxfp4GroupSize;
  return for_windows<Mxfp4Range>(
      m, rows_per_chunk(m),
      [&](int64_t, int64_t begin, int64_t end) {
        Mxfp4Range range;
        for (int64_t i = begin * groups; i < end * groups; ++i) {
          if (mxfp4_group_is_zero(m.weight.as<uint8_t>() + i * (kMxfp4GroupSize / 2))) continue;
          const int byte = m.scale.as<uint8_t>()[i];
          range.add({byte, byte});
        }
        return range;
      },
      [&](int64_t first, int64_t last) {
        if (last - first < m.rows) pages_.release_rows(m, first, last);
      });
}

int64_t ShardEncoder::count_groups_below(const MatrixJob& job, int min_byte) {
  const StoredMatrix& m = job.matrix;
  int64_t count = 0;
  for (int64_t i = 0; i < m.rows * (m.cols / kMxfp4GroupSize); ++i)
    count +=
        m.scale.as<uint8_t>()[i] < min_byte && !mxfp4_group_is_zero(m.weight.as<uint8_t>() + i * (kMxfp4GroupSize / 2));
  return count;
}

const ShardEncoder::Common& ShardEncoder::common_of(int job_idx) {
  const int partner = job(job_idx).partner;
  const int key = partner < 0 ? job_idx : std::min(job_idx, partner);
  if (const auto found = common_.find(key); found != common_.end()) return found->second;

  std::vector<int> members{key};
  if (partner >= 0) members.push_back(std::max(job_idx, partner));
  const bool all_mxfp4 =
      std::all_of(members.begin(), members.end(), [&](int idx) { return job(idx).action == MatrixAction::kCastMxfp4; });
  Common common;
  if (all_mxfp4) {
    Mxfp4Range range;
    for (int idx : members) {
      const Mxfp4Range one = scan_mxfp4(job(idx));
      range.max_byte = std::max(range.max_byte, one.max_byte);
      range.min_byte = std::min(range.min_byte, one.min_byte);
    }
    if (range.max_byte < 0) range = {127 + 8, 127 + 8};  // nothing but zeros: global 1
    common.spread = range.max_byte - range.min_byte;
    common.is_cast = common.spread <= kMxfp4MaxExponentSpread;
    common.max_byte = static_cast<uint8_t>(range.max_byte);
    common.global = mxfp4_to_nvfp4_global(common.max_byte);
    if (!common.is_cast)
      for (int idx : members)
        common.num_beyond_window += count_groups_below(job(idx), range.max_byte - kMxfp4MaxExponentSpread);
  }
  if (!common.is_cast) {
    AmaxRange range;
    for (int idx : members) range.add(scan_amax(job(idx)));
    common.global = rule_global_scale(range, rule_);
    if (!(common.global.value > 0.0f))
      throw_bad_input("{}: {}: largest weight {:g}: too small for a binary32 global scale", job(key).matrix.file,
                      job(key).matrix.name, range.largest);
  }
  return common_.emplace(key, common).first->second;
}

void ShardEncoder::put(const OutputTensor& tensor, SafetensorsWriter& writer, const void* data, uint64_t bytes) {
  writer.append(data, bytes);
  on_bytes_(tensor.spec.name, bytes);
}

void ShardEncoder::write_source(const OutputTensor& tensor, SafetensorsWriter& writer) {
  if (tensor.job >= 0) validate_scales(job(tensor.job).matrix);
  for (uint64_t done = 0; done < tensor.bytes;) {
    const uint64_t count = std::min(kCopyBytes, tensor.bytes - done);
    put(tensor, writer, tensor.source->data + done, count);
    pages_.release(tensor.source->data + done, count);
    done += count;
  }
}

void ShardEncoder::write_nvfp4_codes(const OutputTensor& tensor, SafetensorsWriter& writer) {
  const StoredMatrix& m = job(tensor.job).matrix;
  const Common& common = common_of(tensor.job);
  const int64_t groups = m.cols / kNvfp4GroupSize;
  const int64_t code_bytes = m.cols / 2;
  std::vector<uint8_t>& sf = scales_[tensor.job];
  sf.resize(static_cast<size_t>(m.rows * groups));

  const int64_t chunk_rows = rows_per_chunk(m);
  std::vector<uint8_t> codes(static_cast<size_t>(std::min(m.rows, rows_per_window(m, chunk_rows)) * code_bytes));
  const auto total = for_windows<GroupLoss>(
      m, chunk_rows,
      [&](int64_t first, int64_t begin, int64_t end) {
        std::vector<float> row(static_cast<size_t>(m.cols));
        GroupLoss loss;
        for (int64_t r = begin; r < end; ++r) {
          uint8_t* row_codes = codes.data() + (r - first) * code_bytes;
          uint8_t* row_sf = sf.data() + r * groups;
          if (common.is_cast) {
            std::memcpy(row_codes, m.weight.data + r * code_bytes, static_cast<size_t>(code_bytes));
            cast_mxfp4_row(m, r, common.max_byte, row_sf);
          } else {
            decode_row(m, r, row.data());
            loss.add(encode_groups(row.data(), groups, common.global, rule_, row_codes, row_sf));
          }
        }
        return loss;
      },
      [&](int64_t first, int64_t last) {
        put(tensor, writer, codes.data(), static_cast<uint64_t>((last - first) * code_bytes));
        pages_.release_rows(m, first, last);
      });
  count_matrix(tensor.job, total, m.rows * groups);
  if (common.num_beyond_window > 0)
    notes_.push_back(
        fmt::format("{}: MXFP4 exponents span {} binades (with the other half of its w1/w3 pair), more than the {} "
                    "that a lossless cast "
                    "allows; {} groups of 32 lie beyond: requantised by the {} rule, relative error {:.3e}",
                    m.name, common.spread, kMxfp4MaxExponentSpread, common.num_beyond_window, scale_rule_name(rule_),
                    total.norm_sq > 0 ? std::sqrt(total.error_sq / total.norm_sq) : 0.0));
}

void ShardEncoder::write_fp8_codes(const OutputTensor& tensor, SafetensorsWriter& writer) {
  const StoredMatrix& m = job(tensor.job).matrix;
  validate_scales(m);
  const int64_t block_cols = ceil_div(m.cols, kFp8WeightBlock);
  std::vector<uint8_t>& scales = scales_[tensor.job];
  scales.resize(static_cast<size_t>(ceil_div(m.rows, kFp8WeightBlock) * block_cols));

  std::vector<uint8_t> codes(static_cast<size_t>(std::min(m.rows, rows_per_window(m, kFp8WeightBlock)) * m.cols));
  const auto total = for_windows<GroupLoss>(
      m, kFp8WeightBlock,  // a chunk is one strip of blocks
      [&](int64_t first, int64_t begin, int64_t end) {
        std::vector<float> rows(static_cast<size_t>((end - begin) * m.cols));
        for (int64_t r = begin; r < end; ++r) {
          decode_row(m, r, rows.data() + (r - begin) * m.cols);
          require_finite(m, r, rows.data() + (r - begin) * m.cols);
        }
        GroupLoss loss;
        for (int64_t block = 0; block < block_cols; ++block) {
          const int64_t offset = block * kFp8WeightBlock;
          const Fp8Block shape{end - begin, std::min<int64_t>(kFp8WeightBlock, m.cols - offset), m.cols};
          scales[static_cast<size_t>(begin / kFp8WeightBlock * block_cols + block)] = encode_fp8_weight_block(
              rows.data() + offset, shape, codes.data() + (begin - first) * m.cols + offset, loss);
        }
        return loss;
      },
      [&](int64_t first, int64_t last) {
        put(tensor, writer, codes.data(), static_cast<uint64_t>((last - first) * m.cols));
        pages_.release_rows(m, first, last);
      });
  count_matrix(tensor.job, total, static_cast<int64_t>(scales.size()));
}

void ShardEncoder::write_scales(const OutputTensor& tensor, SafetensorsWriter& writer) {
  const MatrixJob& j = job(tensor.job);
  if (j.action == MatrixAction::kRenameFp8) {
    std::vector<float> widened(static_cast<size_t>(j.matrix.scale.elements()));
    for (size_t i = 0; i < widened.size(); ++i) widened[i] = decode_bf16({j.matrix.scale.as<uint16_t>()[i]});
    return put(tensor, writer, widened.data(), widened.size() * sizeof(float));
  }
  const auto found = scales_.find(tensor.job);
  DSV4_CHECK(found != scales_.end() && found->second.size() == tensor.bytes, "{}: scales before codes",
             tensor.spec.name);
  put(tensor, writer, found->second.data(), found->second.size());
  scales_.erase(found);
}

void ShardEncoder::write_scalar(const OutputTensor& tensor, SafetensorsWriter& writer) {
  const MatrixJob& j = job(tensor.job);
  const bool is_rename = j.action == MatrixAction::kRenameNvfp4;
  float value = 0;
  if (tensor.part == OutputPart::kInputScale) {
    value = j.matrix.input_scale.value_or(1.0f);
  } else {
    value = is_rename ? j.matrix.global_scale : common_of(tensor.job).global.value;
    if (is_rename && j.partner > tensor.job && job(j.partner).matrix.global_scale != value)
      notes_.push_back(
          fmt::format("{} and {}: different global scales ({:g}, {:g}); kept, but engines that fuse the two into "
                      "one GEMM apply only one of them",
                      j.matrix.name, job(j.partner).matrix.name, value, job(j.partner).matrix.global_scale));
  }
  put(tensor, writer, &value, sizeof(value));
}

void ShardEncoder::count_matrix(int job_idx, const GroupLoss& loss, int64_t num_groups) {
  const MatrixJob& j = job(job_idx);
  const bool is_fp8 = j.action == MatrixAction::kEncodeFp8;
  const bool is_cast = j.action == MatrixAction::kCastMxfp4 && common_of(job_idx).is_cast;
  const std::string_view from = stored_format_name(j.matrix.format);
  const std::string_view to = is_fp8 ? "FP8 block" : is_cast ? "NVFP4 (lossless)" : "NVFP4";
  QuantizeKindStats& row = kinds_[fmt::format("{}|{}|{}", j.kind, from, to)];
  row.kind = j.kind;
  row.from = from;
  row.to = to;
  row.num_matrices += 1;
  row.num_elements += j.matrix.rows * j.matrix.cols;
  row.num_groups += num_groups;
  row.num_saturated += loss.num_saturated;
  row.num_zeroed += loss.num_zeroed;
  row.error_sq += loss.error_sq;
  row.norm_sq += loss.norm_sq;
  row.source_bytes += static_cast<uint64_t>(j.matrix.weight.bytes());
  if (j.matrix.scale.data != nullptr) row.source_bytes += static_cast<uint64_t>(j.matrix.scale.bytes());
  row.target_bytes += static_cast<uint64_t>(is_fp8 ? j.matrix.rows * j.matrix.cols + num_groups
                                                   : j.matrix.rows * j.matrix.cols / 2 + num_groups + 8);
}

void ShardEncoder::count_copied(const OutputTensor& tensor) {
  QuantizeKindStats& row = kinds_["~copied"];  // sorts last
  row.kind = "copied unchanged";
  row.num_matrices += 1;
  row.num_elements += num_elements(tensor.spec.shape);
  row.source_bytes += tensor.bytes;
  row.target_bytes += tensor.bytes;
}

ShardResult ShardEncoder::write(const OutputShard& shard, SafetensorsWriter& writer) {
  for (const OutputTensor& tensor : shard.tensors) {
    switch (tensor.part) {
      case OutputPart::kSource:
        write_source(tensor, writer);
        break;
      case OutputPart::kCodes:
        if (job(tensor.job).action == MatrixAction::kEncodeFp8)
          write_fp8_codes(tensor, writer);
        else
          write_nvfp4_codes(tensor, writer);
        break;
      case OutputPart::kSf:
        write_scales(tensor, writer);
        break;
      case OutputPart::kGlobal:
      case OutputPart::kInputScale:
        write_scalar(tensor, writer);
        break;
    }
    if (tensor.part == OutputPart::kSource) count_copied(tensor);
  }
  ShardResult result;
  for (auto& [key, row] : kinds_) result.kinds.push_back(std::move(row));
  result.notes = std::move(notes_);
  kinds_.clear();
  notes_.clear();
  return result;
}

}  // namespace dsv4
