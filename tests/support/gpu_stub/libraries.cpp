// cuBLAS, cuDNN and NCCL of a machine without a GPU: every call succeeds (0) and computes nothing.
//
// Without their headers: C names carry no types, and what a call does not read it need not declare.
#include <cstdlib>
#include <cstring>

#include "stub.h"

#define OK(name) \
    int name() { return 0; }
#define LAUNCH(name)         \
    int name() {             \
        counted::launches++; \
        return 0;            \
    }
#define HANDLE(name)             \
    int name(void** made) {      \
        *made = (void*)0x1000;   \
        return 0;                \
    }
#define ZERO(name, type)              \
    int name(void*, type* value) {    \
        *value = 0;                   \
        return 0;                     \
    }

extern "C" {

// ---- cuBLAS

HANDLE(cublasCreate_v2)
OK(cublasDestroy_v2)
OK(cublasSetStream_v2)
OK(cublasSetWorkspace_v2)
OK(cublasSetMathMode)
OK(cublasSetPointerMode_v2)
OK(cublasSetSmCountTarget)
ZERO(cublasGetMathMode, int)
ZERO(cublasGetPointerMode_v2, int)
LAUNCH(cublasGemmEx)
LAUNCH(cublasSgemm_v2)
LAUNCH(cublasSgemmEx)
LAUNCH(cublasDgemm_v2)
LAUNCH(cublasGemmStridedBatchedEx)
LAUNCH(cublasSgemmStridedBatched)
LAUNCH(cublasDgemmStridedBatched)
LAUNCH(cublasSgemv_v2)
LAUNCH(cublasDgemv_v2)
LAUNCH(cublasSdot_v2)
LAUNCH(cublasDdot_v2)
LAUNCH(cublasDotEx)
LAUNCH(cublasHSHgemvStridedBatched)
LAUNCH(cublasLtMatmul)
HANDLE(cublasLtCreate)
HANDLE(cublasLtMatmulDescCreate)
HANDLE(cublasLtMatrixLayoutCreate)
HANDLE(cublasLtMatmulPreferenceCreate)
OK(cublasLtMatmulDescDestroy)
OK(cublasLtMatrixLayoutDestroy)
OK(cublasLtMatmulPreferenceDestroy)
OK(cublasLtMatmulDescSetAttribute)
OK(cublasLtMatrixLayoutSetAttribute)
OK(cublasLtMatmulPreferenceSetAttribute)
OK(cublasLtMatmulAlgoCheck)
OK(cublasLtMatmulAlgoInit)
OK(cublasLtMatmulAlgoConfigSetAttribute)

int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*,
                                   int* number) {
    *number = 1;
    return 0;
}

// ---- cuDNN: the backend's descriptors remember their type alone

HANDLE(cudnnCreate)
OK(cudnnDestroy)
OK(cudnnSetStream)
ZERO(cudnnGetStream, void*)

int cudnnBackendCreateDescriptor(int, void** descriptor) {
    *descriptor = calloc(64, sizeof(int));
    return 0;
}

int cudnnBackendDestroyDescriptor(void* descriptor) {
    free(descriptor);
    return 0;
}

OK(cudnnBackendFinalize)
OK(cudnnBackendSetAttribute)
LAUNCH(cudnnBackendExecute)

int cudnnBackendGetAttribute(void*, int name, int type, long wanted, long* number, void* values) {
    enum { INT64 = 3, DESCRIPTOR = 15, FALLBACK_HEURISTICS = 302 };
    if (number) *number = type == INT64 || (type == DESCRIPTOR && name != FALLBACK_HEURISTICS);
    if (type == INT64 && values && wanted > 0) *(long*)values = 0;  // the workspace's bytes
    return 0;
}

int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*,
                                                             void*, void*, size_t* size) {
    *size = 0;
    return 0;
}

int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*,
                                                      void*, void*, void*, size_t* size) {
    *size = 0;
    return 0;
}

int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*,
                                                         size_t* size) {
    *size = 0;
    return 0;
}

LAUNCH(cudnnBatchNormalizationForwardTrainingEx)
LAUNCH(cudnnBatchNormalizationBackwardEx)
LAUNCH(cudnnBatchNormalizationForwardInference)

// ---- NCCL: no rank waits for another; the watch notes what each takes part in

struct Communicator {
    int num_ranks, rank;
};
struct UniqueId {
    char bytes[128];
};

int ncclGetUniqueId(UniqueId* made) {
    memset(made, 7, sizeof *made);
    return 0;
}

int ncclCommInitRank(void** made, int num_ranks, UniqueId, int rank) {
    *made = new Communicator{num_ranks, rank};
    return 0;
}

int ncclCommInitRankConfig(void** made, int num_ranks, UniqueId id, int rank, void*) {
    return ncclCommInitRank(made, num_ranks, id, rank);
}

int ncclCommInitRankScalable(void** made, int num_ranks, int rank, int, UniqueId*, void*) {
    return ncclCommInitRank(made, num_ranks, UniqueId(), rank);
}

int ncclCommSplit(void* from, int, int, void** made, void*) {
    *made = new Communicator(*(Communicator*)from);
    return 0;
}

OK(ncclCommDestroy)
OK(ncclCommFinalize)
OK(ncclCommAbort)
OK(ncclGroupStart)
OK(ncclGroupEnd)
OK(ncclCommDeregister)
OK(ncclCommWindowRegister)
OK(ncclCommWindowDeregister)
OK(ncclCommSuspend)
OK(ncclCommResume)
OK(ncclCommRevoke)
OK(ncclRedOpDestroy)
OK(ncclRedOpCreatePreMulSum)
OK(ncclGroupSimulateEnd)
HANDLE(ncclCommRegister)
ZERO(ncclCommGetAsyncError, int)

int ncclCommCount(void* communicator, int* number) {
    *number = ((Communicator*)communicator)->num_ranks;
    return 0;
}

int ncclCommUserRank(void* communicator, int* rank) {
    *rank = ((Communicator*)communicator)->rank;
    return 0;
}

int ncclCommCuDevice(void*, int* device) {
    *device = stub::current_device();
    return 0;
}

static int collected(const char* name, size_t count, int type) {
    static const int widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    counted::collectives++, counted::bytes_collected += count * widths[type];
    stub::tell(name, count * widths[type]);
    return 0;
}

int ncclAllReduce(const void*, void*, size_t count, int type, int, void*, void*) {
    return collected("ncclAllReduce", count, type);
}

int ncclBroadcast(const void*, void*, size_t count, int type, int, void*, void*) {
    return collected("ncclBroadcast", count, type);
}

int ncclBcast(void*, size_t count, int type, int, void*, void*) {
    return collected("ncclBroadcast", count, type);
}

int ncclAllGather(const void*, void*, size_t count, int type, void*, void*) {
    return collected("ncclAllGather", count, type);
}

int ncclReduceScatter(const void*, void*, size_t count, int type, int, void*, void*) {
    return collected("ncclReduceScatter", count, type);
}

int ncclSend(const void*, size_t count, int type, int, void*, void*) {
    return collected("ncclSend", count, type);
}

int ncclRecv(void*, size_t count, int type, int, void*, void*) {
    return collected("ncclRecv", count, type);
}

const char* ncclGetErrorString(int) { return "an error of the pretended NCCL"; }
const char* ncclGetLastError(void*) { return "an error of the pretended NCCL"; }

}  // extern "C"
