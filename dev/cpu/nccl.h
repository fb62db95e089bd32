/*
NCCL on the CPU, over MPI: a rank is a process, and a communicator is a copy of MPI_COMM_WORLD.

A reduction gives the same bits on every rank and in every run: each element has one owner, who
receives the others' values, combines them in the order of the ranks, and hands the result out.
(MPI_Allreduce promises neither: its order may depend on the algorithm that it picks.) bfloat16 is
summed in float and rounded once. A call blocks until it is done, and a group is its calls in order.
Buffers must lie in device memory. Only with -DMULTI_GPU, which links MPI.
*/
#pragma once

// the C++ interface of MPI is long gone, and Open MPI's remains of it do not compile without
// warnings
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX
#endif
#include <mpi.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <algorithm>
#include <vector>

#include "cuda_runtime.h"
#include "cuda_bf16.h"

typedef enum {
    ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclSystemError = 2, ncclInternalError = 3, ncclInvalidArgument = 4,
    ncclInvalidUsage = 5, ncclRemoteError = 6, ncclInProgress = 7
} ncclResult_t;

typedef enum { ncclSum = 0, ncclProd = 1, ncclMax = 2, ncclMin = 3, ncclAvg = 4 } ncclRedOp_t;

typedef enum {
    ncclInt8 = 0, ncclChar = 0, ncclUint8 = 1, ncclInt32 = 2, ncclInt = 2, ncclUint32 = 3,
    ncclInt64 = 4, ncclUint64 = 5, ncclFloat16 = 6, ncclHalf = 6, ncclFloat32 = 7, ncclFloat = 7,
    ncclFloat64 = 8, ncclDouble = 8, ncclBfloat16 = 9
} ncclDataType_t;

#define NCCL_UNIQUE_ID_BYTES 128
typedef struct { char internal[NCCL_UNIQUE_ID_BYTES]; } ncclUniqueId;

struct ncclComm {
    MPI_Comm mpi;
    int num_ranks, rank;
    std::vector<char> received;  // what the other ranks sent of a piece; grows once
};
typedef ncclComm* ncclComm_t;

inline const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
        case ncclSuccess: return "no error";
        case ncclUnhandledCudaError: return "unhandled cuda error";
        case ncclSystemError: return "unhandled system error";
        case ncclInternalError: return "internal error";
        case ncclInvalidArgument: return "invalid argument";
        case ncclInvalidUsage: return "invalid usage";
        case ncclRemoteError: return "remote process exited or there was a network error";
        case ncclInProgress: return "NCCL operation in progress";
    }
    return "unknown result code";
}

// ----------------------------------------------------------------------------
// communicators and groups

// The id only has to be the same on all ranks: ncclCommInitRank checks that somebody sent it
// around.
inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    if (id == NULL) { return ncclInvalidArgument; }
    double now = MPI_Wtime();
    const void* address = id;
    memset(id, 0, sizeof(*id));
    memcpy(id->internal, &now, sizeof(now));
    memcpy(id->internal + sizeof(now), &address, sizeof(address));
    return ncclSuccess;
}

inline ncclResult_t ncclCommInitRank(ncclComm_t* comm, int num_ranks, ncclUniqueId id, int rank) {
    int initialized = 0;
    MPI_Initialized(&initialized);
    if (!initialized) { return ncclInvalidUsage; }
    if (comm == NULL) { return ncclInvalidArgument; }
    ncclUniqueId root_id = id;
    int world_size, world_rank;
    MPI_Comm_size(MPI_COMM_WORLD, &world_size);
    MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
    MPI_Bcast(&root_id, sizeof(root_id), MPI_BYTE, 0, MPI_COMM_WORLD);
    int good =
            num_ranks == world_size && rank == world_rank && memcmp(&id, &root_id, sizeof(id)) == 0,
        all_good;
    MPI_Allreduce(&good, &all_good, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    if (!all_good) { return ncclInvalidArgument; }
    *comm = new ncclComm{MPI_COMM_NULL, num_ranks, rank, {}};
    MPI_Comm_dup(MPI_COMM_WORLD, &(*comm)->mpi);
    return ncclSuccess;
}

inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (comm == NULL) { return ncclInvalidArgument; }
    MPI_Comm_free(&comm->mpi);
    delete comm;
    return ncclSuccess;
}

// takes the other ranks down too, so that none waits for this one
inline ncclResult_t ncclCommAbort(ncclComm_t comm) {
    MPI_Abort(comm == NULL ? MPI_COMM_WORLD : comm->mpi, 1);
    return ncclSuccess;
}

inline thread_local int nccl_group_depth = 0;

inline ncclResult_t ncclGroupStart() {
    nccl_group_depth++;
    return ncclSuccess;
}

inline ncclResult_t ncclGroupEnd() {
    if (nccl_group_depth == 0) { return ncclInvalidUsage; }
    nccl_group_depth--;
    return ncclSuccess;
}

// ----------------------------------------------------------------------------
// pieces of messages

namespace cpu {

// MPI counts bytes in an int, and the values of all ranks for a piece are held at once: buffers go
// in pieces
constexpr size_t NCCL_PIECE = 1 << 20;  // elements

inline size_t nccl_type_bytes(ncclDataType_t type) {
    switch (type) {
        case ncclUint8: return 1;
        case ncclBfloat16: return 2;
        case ncclInt32: case ncclFloat32: return 4;
        case ncclInt64: case ncclFloat64: return 8;
        default: return 0;  // a type that the CPU device does not have
    }
}

struct Piece { char* data; size_t bytes; };

// Sends outgoing[q] to rank q and receives incoming[q] from it, for all other ranks q.
inline void nccl_exchange(ncclComm_t comm, const std::vector<Piece>& outgoing,
                          const std::vector<Piece>& incoming) {
    std::vector<MPI_Request> requests;
    std::vector<int> sources;
    for (int q = 0; q < comm->num_ranks; q++) {
        if (q == comm->rank || incoming[q].bytes == 0) { continue; }
        requests.emplace_back();
        sources.push_back(q);
        MPI_Irecv(incoming[q].data, (int)incoming[q].bytes, MPI_BYTE, q, 0, comm->mpi,
                  &requests.back());
    }
    for (int q = 0; q < comm->num_ranks; q++) {
        if (q == comm->rank || outgoing[q].bytes == 0) { continue; }
        requests.emplace_back();
        MPI_Isend(outgoing[q].data, (int)outgoing[q].bytes, MPI_BYTE, q, 0, comm->mpi,
                  &requests.back());
    }
    std::vector<MPI_Status> statuses(requests.size());
    MPI_Waitall((int)requests.size(), requests.data(), statuses.data());
    for (size_t i = 0; i < sources.size(); i++) {
        int bytes;
        MPI_Get_count(&statuses[i], MPI_BYTE, &bytes);
        if ((size_t)bytes != incoming[sources[i]].bytes) {
            die("nccl: rank %d sent %d bytes where rank %d expected %zu; call it with the same "
                "count and type on all ranks",
                sources[i], bytes, comm->rank, incoming[sources[i]].bytes);
        }
    }
}

template <class A> inline A nccl_combine(A a, A b, ncclRedOp_t op) {
    switch (op) {
        case ncclProd: return a * b;
        case ncclMax: return a > b ? a : b;
        case ncclMin: return a < b ? a : b;
        default: return a + b;
    }
}

// out[i] = the values of all ranks at i, combined in the order of the ranks in type A; values holds
// rank after rank
template <class T, class A> void nccl_reduce_values(void* out, const void* values, size_t count,
                                                    int num_ranks, ncclRedOp_t op) {
    const T* in = (const T*)values;
    for (size_t i = 0; i < count; i++) {
        A sum = (A)in[i];
        for (int q = 1; q < num_ranks; q++) { sum = nccl_combine(sum, (A)in[q * count + i], op); }
        ((T*)out)[i] = (T)(op == ncclAvg ? (A)(sum / (A)num_ranks) : sum);
    }
}

// Reduces onto rank q the `count[q]` elements of everybody's `send` that begin at element
// `first[q]`; this rank's go to out.
inline void nccl_reduce_onto_owners(ncclComm_t comm, const char* send,
                                    const std::vector<size_t>& first,
                                    const std::vector<size_t>& count, char* out,
                                    ncclDataType_t type, ncclRedOp_t op) {
    size_t type_bytes = nccl_type_bytes(type), own = count[comm->rank],
           own_bytes = own * type_bytes;
    comm->received.resize(std::max(comm->received.size(), own_bytes * comm->num_ranks));
    std::vector<Piece> outgoing(comm->num_ranks), incoming(comm->num_ranks);
    for (int q = 0; q < comm->num_ranks; q++) {
        outgoing[q] = Piece{(char*)send + first[q] * type_bytes, count[q] * type_bytes};
        incoming[q] = Piece{comm->received.data() + q * own_bytes, own_bytes};
    }
    if (own > 0) { memcpy(incoming[comm->rank].data, outgoing[comm->rank].data, own_bytes); }
    nccl_exchange(comm, outgoing, incoming);
    const void* values = comm->received.data();
    switch (type) {
        case ncclFloat32: nccl_reduce_values<float, float>(out, values, own, comm->num_ranks, op); break;
        case ncclFloat64: nccl_reduce_values<double, double>(out, values, own, comm->num_ranks, op); break;
        case ncclBfloat16: nccl_reduce_values<__nv_bfloat16, float>(out, values, own, comm->num_ranks, op); break;
        case ncclInt32: nccl_reduce_values<int32_t, int32_t>(out, values, own, comm->num_ranks, op); break;
        case ncclInt64: nccl_reduce_values<int64_t, int64_t>(out, values, own, comm->num_ranks, op); break;
        default: nccl_reduce_values<uint8_t, uint8_t>(out, values, own, comm->num_ranks, op); break;
    }
}

}  // namespace cpu

// ----------------------------------------------------------------------------
// collectives

inline ncclResult_t ncclAllReduce(const void* sendbuff, void* recvbuff, size_t count,
                                  ncclDataType_t datatype, ncclRedOp_t op, ncclComm_t comm,
                                  cudaStream_t /*stream*/) {
    size_t type_bytes = cpu::nccl_type_bytes(datatype);
    if (comm == NULL || type_bytes == 0 || op < ncclSum || op > ncclAvg) {
        return ncclInvalidArgument;
    }
    if (count == 0) { return ncclSuccess; }
    cpu::require_device("ncclAllReduce", "sendbuff", sendbuff, count * type_bytes);
    cpu::require_device("ncclAllReduce", "recvbuff", recvbuff, count * type_bytes);
    cpu::DeviceWork work;
    size_t num_ranks = (size_t)comm->num_ranks;
    std::vector<size_t> first(num_ranks), owned(num_ranks);
    std::vector<cpu::Piece> outgoing(num_ranks), incoming(num_ranks);
    for (size_t begin = 0; begin < count; begin += cpu::NCCL_PIECE) {
        // every rank owns a share of the piece
        size_t end = std::min(count, begin + cpu::NCCL_PIECE),
               share = (end - begin + num_ranks - 1) / num_ranks;
        for (size_t q = 0; q < num_ranks; q++) {
            first[q] = std::min(end, begin + q * share);
            owned[q] = std::min(end, first[q] + share) - first[q];
            incoming[q] =
                cpu::Piece{(char*)recvbuff + first[q] * type_bytes, owned[q] * type_bytes};
        }
        cpu::Piece own = incoming[comm->rank];
        cpu::nccl_reduce_onto_owners(comm, (const char*)sendbuff, first, owned, own.data, datatype,
                                     op);
        std::fill(outgoing.begin(), outgoing.end(), own);
        cpu::nccl_exchange(comm, outgoing, incoming);
    }
    return ncclSuccess;
}

// recvbuff gets block `rank` of the reduced sendbuff, which has a block of recvcount elements for
// each rank
inline ncclResult_t ncclReduceScatter(const void* sendbuff, void* recvbuff, size_t recvcount,
                                      ncclDataType_t datatype, ncclRedOp_t op, ncclComm_t comm,
                                      cudaStream_t /*stream*/) {
    size_t type_bytes = cpu::nccl_type_bytes(datatype);
    if (comm == NULL || type_bytes == 0 || op < ncclSum || op > ncclAvg) {
        return ncclInvalidArgument;
    }
    if (recvcount == 0) { return ncclSuccess; }
    size_t num_ranks = (size_t)comm->num_ranks,
           piece = (cpu::NCCL_PIECE + num_ranks - 1) / num_ranks;
    cpu::require_device("ncclReduceScatter", "sendbuff", sendbuff,
                        num_ranks * recvcount * type_bytes);
    cpu::require_device("ncclReduceScatter", "recvbuff", recvbuff, recvcount * type_bytes);
    cpu::DeviceWork work;
    std::vector<size_t> first(num_ranks), owned(num_ranks);
    for (size_t begin = 0; begin < recvcount; begin += piece) {
        for (size_t q = 0; q < num_ranks; q++) {
            first[q] = q * recvcount + begin;
            owned[q] = std::min(recvcount - begin, piece);
        }
        cpu::nccl_reduce_onto_owners(comm, (const char*)sendbuff, first, owned,
                                     (char*)recvbuff + begin * type_bytes, datatype, op);
    }
    return ncclSuccess;
}

// block q of recvbuff gets the sendbuff of rank q
inline ncclResult_t ncclAllGather(const void* sendbuff, void* recvbuff, size_t sendcount,
                                  ncclDataType_t datatype, ncclComm_t comm,
                                  cudaStream_t /*stream*/) {
    size_t type_bytes = cpu::nccl_type_bytes(datatype);
    if (comm == NULL || type_bytes == 0) { return ncclInvalidArgument; }
    if (sendcount == 0) { return ncclSuccess; }
    size_t num_ranks = (size_t)comm->num_ranks, block = sendcount * type_bytes;
    cpu::require_device("ncclAllGather", "sendbuff", sendbuff, block);
    cpu::require_device("ncclAllGather", "recvbuff", recvbuff, num_ranks * block);
    cpu::DeviceWork work;
    std::vector<cpu::Piece> outgoing(num_ranks), incoming(num_ranks);
    for (size_t begin = 0; begin < block; begin += cpu::NCCL_PIECE) {
        size_t bytes = std::min(cpu::NCCL_PIECE, block - begin);
        for (size_t q = 0; q < num_ranks; q++) {
            outgoing[q] = cpu::Piece{(char*)sendbuff + begin, bytes};
            incoming[q] = cpu::Piece{(char*)recvbuff + q * block + begin, bytes};
        }
        memmove(incoming[comm->rank].data, outgoing[comm->rank].data, bytes);
        cpu::nccl_exchange(comm, outgoing, incoming);
    }
    return ncclSuccess;
}

// recvbuff gets the sendbuff of root, which the other ranks may leave NULL
inline ncclResult_t ncclBroadcast(const void* sendbuff, void* recvbuff, size_t count,
                                  ncclDataType_t datatype, int root, ncclComm_t comm,
                                  cudaStream_t /*stream*/) {
    size_t bytes = count * cpu::nccl_type_bytes(datatype);
    if (comm == NULL || cpu::nccl_type_bytes(datatype) == 0 || root < 0 ||
        root >= comm->num_ranks) {
        return ncclInvalidArgument;
    }
    if (count == 0) { return ncclSuccess; }
    cpu::require_device("ncclBroadcast", "recvbuff", recvbuff, bytes);
    cpu::DeviceWork work;
    if (comm->rank == root) {
        cpu::require_device("ncclBroadcast", "sendbuff", sendbuff, bytes);
        memmove(recvbuff, sendbuff, bytes);
    }
    for (size_t begin = 0; begin < bytes; begin += cpu::NCCL_PIECE) {
        MPI_Bcast((char*)recvbuff + begin, (int)std::min(cpu::NCCL_PIECE, bytes - begin), MPI_BYTE,
                  root, comm->mpi);
    }
    return ncclSuccess;
}
