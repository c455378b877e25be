// Everything one sequence keeps between steps: per layer the ring of recent kv rows, compressed rows, indexer keys and
// compressor states. Spec section 6.
//
// Memory is owned here; ops read it through ops/attention/kv_view.h. Compressed rows and keys live in pages of
// kRowsPerPage rows that never move. The ring holds window_len + max_chunk - 1 rows, so that a whole chunk can be written
// before any of its tokens attends.
//
// The state cannot be rewound by truncation (a ring slot and a compressor slot are overwritten by later tokens): take a
// snapshot where a later rewind may be wanted.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops/attention/kv_view.h"
#include "ops/compressor/compressor.h"
#include "ops/precision.h"

namespace dsv4 {

// Rows of equal size, appended in pages.
class PagedRows {
 public:
  static constexpr int64_t kRowsPerPage = 256;

  explicit PagedRows(int64_t row_bytes = 0) : row_bytes_(row_bytes) {}

  uint8_t* append();
  void truncate(int64_t num_rows);
  int64_t num_rows() const { return num_rows_; }
  int64_t allocated_bytes() const { return static_cast<int64_t>(pages_.size()) * kRowsPerPage * row_bytes_; }
  PagedRowsView view() const { return {pointers_.data(), kRowsPerPage, row_bytes_, num_rows_}; }

 private:
  int64_t row_bytes_;
  int64_t num_rows_ = 0;
  std::vector<std::unique_ptr<uint8_t[]>> pages_;
  std::vector<const uint8_t*> pointers_;
};

// What one layer keeps; ratio 0 has only the ring.
struct LayerCacheShape {
  CompressorShape compressor;  // ratio == 0: none
  CompressorShape index;       // ratio == 0: none (only CSA layers have an indexer)
};

struct CacheShape {
  KvRowLayout row;
  IndexKeyLayout index_key;
  int window_len = 0;
  int64_t max_chunk = 0;  // most tokens of this sequence in one step
  std::vector<LayerCacheShape> layers;
};

struct CompressorState {
  std::vector<float> value;
  std::vector<float> gate;
};

class LayerCache {
 public:
  LayerCache(const CacheShape& shape, const LayerCacheShape& layer);

  uint8_t* window_row(int64_t position) { return window_.data() + (position % capacity_) * row_bytes_; }
  WindowView window() const { return {window_.data(), capacity_, row_bytes_}; }

  PagedRows compressed;
  PagedRows index_keys;
  CompressorState compressor;
  CompressorState index_compressor;

 private:
  friend class SequenceCache;
  int64_t row_bytes_;
  int64_t capacity_;
  std::vector<uint8_t> window_;
};

class SequenceCache {
 public:
  explicit SequenceCache(CacheShape shape);

  const CacheShape& shape() const { return shape_; }
  int64_t num_tokens() const { return num_tokens_; }  // = position of the next token
  void advance(int64_t count) { num_tokens_ += count; }
  LayerCache& layer(int idx) { return layers_[static_cast<size_t>(idx)]; }
  int64_t allocated_bytes() const;

  void clear();

  // Rings, states and row counts at this moment; rows are append-only and need no copy.
  struct Snapshot {
    int64_t num_tokens = 0;
    struct Layer {
      std::vector<uint8_t> window;
      CompressorState compressor, index_compressor;
      int64_t num_compressed = 0, num_keys = 0;
    };
    std::vector<Layer> layers;
  };
  Snapshot snapshot() const;
  // Only of this cache, and only if nothing before the snapshot was rewound since.
  void restore(const Snapshot& snapshot);

 private:
  CacheShape shape_;
  int64_t num_tokens_ = 0;
  std::vector<LayerCache> layers_;
};

}  // namespace dsv4
