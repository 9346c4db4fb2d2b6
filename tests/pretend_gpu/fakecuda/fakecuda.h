// What the parts of the pretend GPU share: the log, errors, and the model of streams and captures. See README.md beside this folder.
#pragma once
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>

#include <cuda.h>
#include <cuda_runtime_api.h>

#define OK cudaSuccess

// ---- log.c
extern pthread_mutex_t big;  // recursive; held by whoever reads or changes anything below
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
cudaError_t fail(cudaError_t error);  // remembers it for this thread's cudaGetLastError
int setting(const char* name, int otherwise);

// ---- device.c
int current_device(void);  // of the calling thread
int device_count(void);
int sm(void);  // 80 or 90

// ---- streams.c
enum { MEMBERS = 32 };  // streams that may take part in one capture

typedef struct Write {  // what is really done to memory: a copy, or a fill where `from` is NULL
    void* to;
    const void* from;
    size_t bytes;
    char pattern[8];
    int width;  // bytes of the pattern
    struct Write* next;
} Write;

typedef struct Graph {
    int number, nodes;
    Write *writes, **end;  // in order; performed at each launch
} Graph;

typedef struct Stream Stream;

typedef struct Capture {
    int number, invalid, members;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    Stream* member[MEMBERS];  // member[0] is where it began
    unsigned seen[MEMBERS][MEMBERS];  // seen[a][b]: how many of b's operations happen before whatever a does next
    Graph* graph;
    struct Capture* next;
} Capture;

struct Stream {
    int number, device;  // number 0: the default stream
    Capture* capture;  // or NULL
    int member;  // its place in the capture
};

Stream* stream_of(const void* handle);  // cudaStream_t or CUstream; NULL is the current device's default stream
cudaError_t enqueue(Stream* stream, int* captured);  // one operation on a stream; *captured: the capture's number, 0 where it runs now
cudaError_t unsafe(const char* what);  // before a call that may synchronise: error 900 where the rules of capture forbid it
int invalidate_captures_of(int device);  // whether there are any

// ---- memory.c
enum { NOWHERE, DEVICE, PINNED };
int kind_of(const void* pointer, int* device);
void write_now_or_later(Write what, Stream* stream);  // later: when the graph that captures it is launched
void perform(const Write* what);
