// The device side of foundation_kernels.h.
#include "foundation_kernels.h"

#include "gpu/launch.h"
#include "gpu/ptx/copy.cuh"
#include "gpu/ptx/sync.cuh"

namespace dsv4::test {
namespace {

__global__ void copy_box_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to,
                                int col, int row, uint8_t* raw) {
  extern __shared__ __align__(1024) uint8_t box[];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&full, kBoxBytes);
    ptx::tma_load_2d(box, &from, col, row, &full);
  }
  __syncthreads();
  ptx::mbarrier_wait(&full, 0);
  for (int i = threadIdx.x; i < kBoxBytes; i += blockDim.x) raw[i] = box[i];
  if (threadIdx.x == 0) {
    ptx::tma_store_2d(&to, box, col, row);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

// Each CTA of the pair loads half of the box's rows into both.
__global__ void multicast_box_kernel(const __grid_constant__ CUtensorMap half_box, uint8_t* raw) {
  extern __shared__ __align__(1024) uint8_t box[];
  __shared__ uint64_t full;
  const int rank = static_cast<int>(ptx::cluster_cta_rank());
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();  // both barriers exist before either copy completes on them
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&full, kBoxBytes);
    ptx::tma_load_2d_multicast(box + rank * (kBoxBytes / 2), &half_box, 0, rank * (kBoxRows / 2), &full, 0b11);
  }
  ptx::mbarrier_wait(&full, 0);
  for (int i = threadIdx.x; i < kBoxBytes; i += blockDim.x) raw[rank * kBoxBytes + i] = box[i];
  ptx::cluster_sync();
}

__global__ void bulk_round_trip_kernel(const uint8_t* from, uint8_t* to, int bytes) {
  extern __shared__ __align__(1024) uint8_t piece[];
  __shared__ uint64_t full;
  if (threadIdx.x != 0) return;
  ptx::mbarrier_init(&full, 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_arrive_expect_tx(&full, static_cast<uint32_t>(bytes));
  ptx::bulk_load(piece, from, static_cast<uint32_t>(bytes), &full);
  ptx::mbarrier_wait(&full, 0);
  ptx::bulk_store(to, piece, static_cast<uint32_t>(bytes));
  ptx::bulk_commit();
  ptx::bulk_wait<0>();
}

__global__ void add_one_kernel(int32_t* values, int count) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();  // the next launch starts while this one still writes; its wait must hold it
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < count;
       i += static_cast<int>(gridDim.x * blockDim.x))
    ++values[i];
}

}  // namespace

void copy_box(const CUtensorMap& from, const CUtensorMap& to, int col, int row, uint8_t* raw, cudaStream_t stream) {
  gpu::launch(copy_box_kernel, {.block = 128, .smem_bytes = kBoxBytes, .stream = stream}, from, to, col, row, raw);
}
void multicast_box(const CUtensorMap& half_box, uint8_t* raw, cudaStream_t stream) {
  gpu::launch(multicast_box_kernel, {.grid = 2, .block = 128, .smem_bytes = kBoxBytes, .stream = stream, .cluster = 2},
              half_box, raw);
}
void bulk_round_trip(const uint8_t* from, uint8_t* to, int bytes, cudaStream_t stream) {
  gpu::allow_smem(bulk_round_trip_kernel, bytes);
  gpu::launch(bulk_round_trip_kernel, {.block = 32, .smem_bytes = bytes, .stream = stream}, from, to, bytes);
}
void add_one(int32_t* values, int count, int ctas, bool dependent, cudaStream_t stream) {
  gpu::launch(add_one_kernel,
              {.grid = static_cast<unsigned>(ctas), .block = 256, .stream = stream, .dependent = dependent}, values,
              count);
}
void launch_too_many_threads(cudaStream_t stream) {
  add_one_kernel<<<1, 2048, 0, stream>>>(nullptr, 0);
  gpu::check_launch("add_one", "[%d x %d]", 3, 4);
}

}  // namespace dsv4::test
