// NCCL between processes of one machine: float32 is really summed, in the order of ranks, through a file that all of them map. A collective is done
// when it is enqueued, so there the host waits for the others, which on a card it does not. What else is asked for is answered by zeros: nothing
// here has computed it.
#include "fakecuda.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, SYSTEM_ERROR = 2, FLOAT32 = 7, ID = 128 };
static const size_t MOST = 16u << 20;  // bytes; of more the sum is left out, as nothing computes on it
static const int SECONDS = 100;  // that the others may be late
static const int width[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // bytes, by ncclDataType_t

typedef struct {
    int rank, ranks, device;
    volatile int* arrived;  // in the shared file, before the ranks' slots of MOST bytes
    char* slots;
    int meetings;
} Comm;

typedef struct {
    char internal[ID];
} Id;

int ncclGetVersion(int* version) {
    *version = 22800;
    return SUCCESS;
}
const char* ncclGetErrorString(int result) { return result ? "another process is gone or late" : "no error"; }
const char* ncclGetLastError(Comm* comm) { return ""; }
int ncclGetUniqueId(Id* id) {
    memset(id, 0, sizeof *id);
    snprintf(id->internal, ID, "/dev/shm/fakenccl-%d-%ld", getpid(), (long)clock());
    return SUCCESS;
}

static int meet(Comm* comm) {
    int goal = comm->ranks * ++comm->meetings;
    __atomic_add_fetch(comm->arrived, 1, __ATOMIC_SEQ_CST);
    for (time_t end = time(NULL) + SECONDS; __atomic_load_n(comm->arrived, __ATOMIC_SEQ_CST) < goal; usleep(100))
        if (time(NULL) > end) return SYSTEM_ERROR;
    return SUCCESS;
}

int ncclCommInitRankConfig(Comm** made, int ranks, Id id, int rank, void* config) {
    Comm* comm = *made = calloc(1, sizeof *comm);
    *comm = (Comm){.rank = rank, .ranks = ranks, .device = current_device()};
    size_t whole = 4096 + ranks * MOST;
    int file = open(id.internal, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, whole)) return SYSTEM_ERROR;
    comm->arrived = mmap(0, whole, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (comm->arrived == MAP_FAILED) return SYSTEM_ERROR;
    comm->slots = (char*)comm->arrived + 4096;
    int result = meet(comm);
    unlink(id.internal);  // all have it
    say("N ncclCommInitRankConfig device=%d", comm->device);
    return result;
}
int ncclCommInitRank(Comm** made, int ranks, Id id, int rank) { return ncclCommInitRankConfig(made, ranks, id, rank, NULL); }
int ncclCommUserRank(Comm* comm, int* rank) {
    *rank = comm->rank;
    return SUCCESS;
}
int ncclCommCount(Comm* comm, int* ranks) {
    *ranks = comm->ranks;
    return SUCCESS;
}
int ncclCommFinalize(Comm* comm) { return SUCCESS; }
int ncclCommDestroy(Comm* comm) {
    say("N ncclCommDestroy device=%d", comm->device);
    munmap((void*)comm->arrived, 4096 + comm->ranks * MOST);
    free(comm);
    return SUCCESS;
}
int ncclCommGetAsyncError(Comm* comm, int* result) {
    *result = SUCCESS;
    return SUCCESS;
}

// count: of what is sent. `from` goes into this process's slot; then `to` is made from all, elements [first, first + many) of each.
enum { SUM, FIRST_OF, ALL };
static int collective(const char* what, int how, Comm* comm, const void* from, void* to, size_t count, int type, size_t first, size_t many,
                      int root, cudaStream_t handle) {
    Stream* stream = stream_of(handle);
    size_t bytes = count * width[type];
    int number = 0;
    if (enqueue(stream, &number)) return SYSTEM_ERROR;
    say("N %s %zu device=%d stream=%d capture=%d", what, bytes, stream->device, stream->number, number);
    if (kind_of(from, NULL) != DEVICE || kind_of(to, NULL) != DEVICE) say("X %s of memory that is not the card's", what);
    if (stream->capture || bytes > MOST) return SUCCESS;
    memcpy(comm->slots + comm->rank * MOST, from, bytes);
    if (meet(comm)) return SYSTEM_ERROR;
    if (how == FIRST_OF) memcpy(to, comm->slots + root * MOST, bytes);
    if (how == SUM) memset(to, 0, many * width[type]);
    for (int rank = 0; rank < comm->ranks; rank++) {
        char* slot = comm->slots + rank * MOST;
        if (how == ALL) memcpy((char*)to + rank * bytes, slot, bytes);
        for (size_t i = 0; how == SUM && type == FLOAT32 && i < many; i++) ((float*)to)[i] += ((float*)slot)[first + i];
    }
    return meet(comm);
}
static void only_sums(const char* what, int op) {
    if (op) say("X %s with operation %d: only sums are modelled", what, op);
}
int ncclAllReduce(const void* from, void* to, size_t count, int type, int op, Comm* comm, cudaStream_t stream) {
    only_sums("ncclAllReduce", op);
    return collective("ncclAllReduce", SUM, comm, from, to, count, type, 0, count, 0, stream);
}
int ncclReduceScatter(const void* from, void* to, size_t each, int type, int op, Comm* comm, cudaStream_t stream) {
    only_sums("ncclReduceScatter", op);
    return collective("ncclReduceScatter", SUM, comm, from, to, each * comm->ranks, type, each * comm->rank, each, 0, stream);
}
int ncclAllGather(const void* from, void* to, size_t each, int type, Comm* comm, cudaStream_t stream) {
    return collective("ncclAllGather", ALL, comm, from, to, each, type, 0, 0, 0, stream);
}
int ncclBcast(void* both, size_t count, int type, int root, Comm* comm, cudaStream_t stream) {
    return collective("ncclBcast", FIRST_OF, comm, both, both, count, type, 0, 0, root, stream);
}
int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Comm* comm, cudaStream_t stream) {
    return collective("ncclBroadcast", FIRST_OF, comm, from, to, count, type, 0, 0, root, stream);
}
