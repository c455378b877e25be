// cuTensorMapEncodeTiled through cudaGetDriverEntryPointByVersion.
#include "gpu/tma.h"

#include "gpu/check.h"
#include "gpu/error.h"

namespace dsv4::gpu {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  DSV4_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || !entry)
    throw_resource("the CUDA driver has no cuTensorMapEncodeTiled: 12.0 or later is needed");
  return reinterpret_cast<Encode>(entry);
}

CUtensorMapDataType data_type(TmaType type) {
  switch (type) {
    case TmaType::kU8:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    case TmaType::kU16:
      return CU_TENSOR_MAP_DATA_TYPE_UINT16;
    case TmaType::kU32:
      return CU_TENSOR_MAP_DATA_TYPE_UINT32;
    case TmaType::kBf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case TmaType::kF16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case TmaType::kF32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
  throw Error(ErrorKind::kInternal, "tma: unknown element type");
}

CUtensorMapSwizzle swizzle_mode(TmaSwizzle swizzle) {
  switch (swizzle) {
    case TmaSwizzle::kNone:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
    case TmaSwizzle::k32B:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case TmaSwizzle::k64B:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case TmaSwizzle::k128B:
      return CU_TENSOR_MAP_SWIZZLE_128B;
  }
  throw Error(ErrorKind::kInternal, "tma: unknown swizzle");
}

CUtensorMapL2promotion promotion_mode(TmaL2Promotion promotion) {
  switch (promotion) {
    case TmaL2Promotion::kNone:
      return CU_TENSOR_MAP_L2_PROMOTION_NONE;
    case TmaL2Promotion::k64B:
      return CU_TENSOR_MAP_L2_PROMOTION_L2_64B;
    case TmaL2Promotion::k128B:
      return CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    case TmaL2Promotion::k256B:
      return CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  }
  throw Error(ErrorKind::kInternal, "tma: unknown L2 promotion");
}

}  // namespace

CUtensorMap make_tma_map(TmaType type, const void* base, const TmaShape& shape, TmaSwizzle swizzle,
                         TmaL2Promotion promotion) {
  static const Encode encode = find_encoder();
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  cuuint64_t size[5], stride[5];
  cuuint32_t box[5];
  for (int d = 0; d < 5; ++d) size[d] = shape.size[d], stride[d] = shape.stride_bytes[d], box[d] = shape.box[d];
  CUtensorMap map{};
  const CUresult result = encode(&map, data_type(type), static_cast<cuuint32_t>(shape.rank), const_cast<void*>(base),
                                 size, stride + 1, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 swizzle_mode(swizzle), promotion_mode(promotion), CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw Error(ErrorKind::kInternal, fmt::format("tma: the driver refused a rank-{} map (CUresult {}): base {}, size "
                                                  "{} x {} x {}, stride {} {} bytes, box {} x {} x {}",
                                                  shape.rank, static_cast<int>(result), base, size[0], size[1], size[2],
                                                  stride[1], stride[2], box[0], box[1], box[2]));
  return map;
}

CUtensorMap make_tma_map_2d(TmaType type, const void* base, uint64_t rows, uint64_t cols, uint64_t stride_bytes,
                            uint32_t box_rows, uint32_t box_cols, TmaSwizzle swizzle, TmaL2Promotion promotion) {
  TmaShape shape;
  shape.rank = 2;
  shape.size[0] = cols, shape.size[1] = rows;
  shape.stride_bytes[1] = stride_bytes;
  shape.box[0] = box_cols, shape.box[1] = box_rows;
  return make_tma_map(type, base, shape, swizzle, promotion);
}

}  // namespace dsv4::gpu
