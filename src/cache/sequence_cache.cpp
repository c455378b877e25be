// Allocation, clearing and snapshots of a sequence's cache.
#include "cache/sequence_cache.h"

#include <utility>

#include "base/check.h"

namespace dsv4 {
namespace {

CompressorState make_state(const CompressorShape& shape) {
  CompressorState state;
  if (shape.ratio == 0) return state;
  state.value.resize(static_cast<size_t>(shape.state_elems()));
  state.gate.resize(static_cast<size_t>(shape.state_elems()));
  reset_compressor_state(shape, state.value.data(), state.gate.data());
  return state;
}

}  // namespace

uint8_t* PagedRows::append() {
  if (num_rows_ == static_cast<int64_t>(pages_.size()) * kRowsPerPage) {
    pages_.push_back(std::make_unique<uint8_t[]>(static_cast<size_t>(kRowsPerPage * row_bytes_)));
    pointers_.push_back(pages_.back().get());
  }
  uint8_t* row = pages_[static_cast<size_t>(num_rows_ / kRowsPerPage)].get() + num_rows_ % kRowsPerPage * row_bytes_;
  ++num_rows_;
  return row;
}

void PagedRows::truncate(int64_t num_rows) {
  DSV4_CHECK(num_rows <= num_rows_, "truncate {} rows to {}", num_rows_, num_rows);
  num_rows_ = num_rows;
}

LayerCache::LayerCache(const CacheShape& shape, const LayerCacheShape& layer)
    : compressed(shape.row.row_bytes()),
      index_keys(shape.index_key.row_bytes()),
      compressor(make_state(layer.compressor)),
      index_compressor(make_state(layer.index)),
      row_bytes_(shape.row.row_bytes()),
      capacity_(shape.window_len + shape.max_chunk - 1),
      window_(static_cast<size_t>(capacity_ * row_bytes_)) {}

SequenceCache::SequenceCache(CacheShape shape) : shape_(std::move(shape)) {
  DSV4_CHECK(shape_.window_len >= 1 && shape_.max_chunk >= 1, "window_len = {}, max_chunk = {}", shape_.window_len,
             shape_.max_chunk);
  for (const LayerCacheShape& layer : shape_.layers) layers_.emplace_back(shape_, layer);
}

int64_t SequenceCache::allocated_bytes() const {
  int64_t bytes = 0;
  for (const LayerCache& layer : layers_)
    bytes +=
        static_cast<int64_t>(layer.window_.size()) + layer.compressed.allocated_bytes() +
        layer.index_keys.allocated_bytes() +
        static_cast<int64_t>(sizeof(float) * 2 * (layer.compressor.value.size() + layer.index_compressor.value.size()));
  return bytes;
}

void SequenceCache::clear() {
  num_tokens_ = 0;
  for (size_t idx = 0; idx < layers_.size(); ++idx) {
    layers_[idx].compressed.truncate(0);
    layers_[idx].index_keys.truncate(0);
    layers_[idx].compressor = make_state(shape_.layers[idx].compressor);
    layers_[idx].index_compressor = make_state(shape_.layers[idx].index);
  }
}

SequenceCache::Snapshot SequenceCache::snapshot() const {
  Snapshot result;
  result.num_tokens = num_tokens_;
  for (const LayerCache& layer : layers_)
    result.layers.push_back({layer.window_, layer.compressor, layer.index_compressor, layer.compressed.num_rows(),
                             layer.index_keys.num_rows()});
  return result;
}

void SequenceCache::restore(const Snapshot& snapshot) {
  DSV4_CHECK(snapshot.layers.size() == layers_.size() && snapshot.num_tokens <= num_tokens_,
             "snapshot of {} layers at token {}, cache of {} at {}", snapshot.layers.size(), snapshot.num_tokens,
             layers_.size(), num_tokens_);
  num_tokens_ = snapshot.num_tokens;
  for (size_t idx = 0; idx < layers_.size(); ++idx) {
    LayerCache& layer = layers_[idx];
    const Snapshot::Layer& saved = snapshot.layers[idx];
    layer.window_ = saved.window;
    layer.compressor = saved.compressor;
    layer.index_compressor = saved.index_compressor;
    layer.compressed.truncate(saved.num_compressed);
    layer.index_keys.truncate(saved.num_keys);
  }
}

}  // namespace dsv4
