// Streams, events, captures and graphs. Work is done when it is enqueued, so nothing ever waits; what is modelled is what CUDA forbids.
//
// The rules are those of the CUDA programming guide ("Prohibited and Unhandled Operations" under stream capture) and of
// cudaThreadExchangeStreamCaptureMode: who captures what is kept per capture and per thread, so that one thread may be refused a call that
// another is allowed. A capture that saw a forbidden call is invalid from there on and yields no graph.
#include "fakecuda.h"

#include <stdlib.h>
#include <string.h>

typedef struct Event {
    int recorded, device, capture;  // capture: the number of the one it was recorded in, 0 outside
    int spins;                      // what waits for it does not sleep
    unsigned seen[MEMBERS];
} Event;

static Capture* captures;  // those that go on
static int numbers, stream_numbers, graph_numbers;
static __thread enum cudaStreamCaptureMode mode_here = cudaStreamCaptureModeGlobal;

// ---- what is forbidden
static cudaError_t refuse(Capture* capture, const char* what, const char* why, cudaError_t error) {
    if (capture) capture->invalid = 1;
    say("X %s: %s", what, why);
    return fail(error);
}

cudaError_t unsafe(const char* what) {
    cudaError_t error = OK;
    pthread_mutex_lock(&big);
    for (Capture* c = captures; c && mode_here != cudaStreamCaptureModeRelaxed; c = c->next) {
        int own = pthread_equal(c->thread, pthread_self());
        if (own && c->mode != cudaStreamCaptureModeRelaxed)
            error = refuse(c, what, "this thread is capturing", cudaErrorStreamCaptureUnsupported);
        else if (!own && c->mode == cudaStreamCaptureModeGlobal && mode_here == cudaStreamCaptureModeGlobal)
            error = refuse(c, what, "another thread is capturing in global mode", cudaErrorStreamCaptureUnsupported);
    }
    pthread_mutex_unlock(&big);
    return error;
}

int invalidate_captures_of(int device) {
    int found = 0;
    pthread_mutex_lock(&big);
    for (Capture* c = captures; c; c = c->next)
        if (c->member[0]->device == device) found = c->invalid = 1;
    pthread_mutex_unlock(&big);
    return found;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
    enum cudaStreamCaptureMode before = mode_here;
    mode_here = *mode;
    *mode = before;
    return OK;
}

// ---- streams
Stream* stream_of(const void* handle) {
    static Stream defaults[64];
    if ((size_t)handle > 2) return (Stream*)handle;  // 0, 1 and 2 are the default streams' special handles
    Stream* stream = &defaults[current_device()];
    stream->device = current_device();
    return stream;
}

static cudaError_t new_stream(cudaStream_t* handle) {
    Stream* stream = calloc(1, sizeof *stream);
    stream->device = current_device();
    stream->number = __sync_add_and_fetch(&stream_numbers, 1);
    *handle = (cudaStream_t)stream;
    return OK;
}
cudaError_t cudaStreamCreate(cudaStream_t* handle) { return new_stream(handle); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) { return new_stream(handle); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) { return new_stream(handle); }
cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
    *priority = 0;
    return OK;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return OK;
}

cudaError_t enqueue(Stream* stream, int* captured) {
    cudaError_t error = OK;
    pthread_mutex_lock(&big);
    Capture* c = stream->capture;
    *captured = c ? c->number : 0;
    if (stream->device != current_device()) {
        say("X work for stream %d of device %d while device %d is current", stream->number, stream->device, current_device());
        error = fail(cudaErrorInvalidResourceHandle);
    } else if (c && c->invalid)
        error = fail(cudaErrorStreamCaptureInvalidated);
    else if (c) {
        c->seen[stream->member][stream->member]++;
        c->graph->nodes++;
    }
    pthread_mutex_unlock(&big);
    return error;
}

static cudaError_t wait_for_stream(const char* what, cudaStream_t handle, int log) {
    Stream* stream = stream_of(handle);
    if (stream->capture) return refuse(stream->capture, what, "the stream is capturing", cudaErrorStreamCaptureUnsupported);
    cudaError_t error = unsafe(what);
    if (!error && log) say("S %s device=%d stream=%d", what, stream->device, stream->number);
    return error;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) { return wait_for_stream("cudaStreamSynchronize", handle, 1); }
cudaError_t cudaStreamQuery(cudaStream_t handle) { return wait_for_stream("cudaStreamQuery", handle, 0); }

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
    int captured;
    cudaError_t error = enqueue(stream_of(handle), &captured);
    if (!error && !captured) function(data);
    return error;
}

// ---- events
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
    Event* event = calloc(1, sizeof(Event));
    event->spins = !(flags & cudaEventBlockingSync);
    *handle = (cudaEvent_t)event;
    return OK;
}
cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    free(handle);
    return OK;
}

static Capture* going_on(int number) {
    for (Capture* c = captures; c; c = c->next)
        if (c->number == number) return c;
    return NULL;
}

static cudaError_t record(cudaEvent_t handle, cudaStream_t where) {
    Event* event = (Event*)handle;
    Stream* stream = stream_of(where);
    pthread_mutex_lock(&big);
    event->recorded = 1;
    event->device = stream->device;
    event->capture = stream->capture ? stream->capture->number : 0;
    if (stream->capture) memcpy(event->seen, stream->capture->seen[stream->member], sizeof event->seen);
    say("E record device=%d stream=%d capture=%d", stream->device, stream->number, event->capture);
    pthread_mutex_unlock(&big);
    return OK;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return record(event, stream); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return record(event, stream); }

static cudaError_t ask(const char* what, cudaEvent_t handle, int log) {
    Event* event = (Event*)handle;
    if (event->capture)
        return refuse(going_on(event->capture), what, "the event was recorded in a capture", cudaErrorCapturedEvent);
    cudaError_t error = unsafe(what);
    if (!error && log) say("S %s device=%d spins=%d", what, event->device, event->spins);
    return error;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return ask("cudaEventSynchronize", event, 1); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return ask("cudaEventQuery", event, 0); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t last) {
    *milliseconds = 0.01f;
    return ((Event*)first)->capture || ((Event*)last)->capture ? fail(cudaErrorCapturedEvent) : OK;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t awaited, unsigned flags) {
    Stream* stream = stream_of(handle);
    Event* event = (Event*)awaited;
    cudaError_t error = OK;
    pthread_mutex_lock(&big);
    Capture *theirs = going_on(event->capture), *ours = stream->capture;
    if (!event->recorded)
        ;  // nothing to wait for
    else if (ours && !theirs)
        error = refuse(ours, "cudaStreamWaitEvent", "the event was recorded outside of the capture", cudaErrorStreamCaptureIsolation);
    else if (ours && ours != theirs)
        error = refuse(ours, "cudaStreamWaitEvent", "the event is another capture's", cudaErrorStreamCaptureMerge);
    else if (theirs && stream->number == 0)
        error = refuse(theirs, "cudaStreamWaitEvent", "the default stream cannot be captured", cudaErrorStreamCaptureImplicit);
    else if (theirs && !ours && theirs->members == MEMBERS)
        error = refuse(theirs, "cudaStreamWaitEvent", "more streams in one capture than this model has room for", cudaErrorInvalidValue);
    else if (theirs) {
        if (!ours) {
            stream->capture = theirs;
            stream->member = theirs->members++;
            theirs->member[stream->member] = stream;
        }
        unsigned* seen = theirs->seen[stream->member];
        for (int i = 0; i < MEMBERS; i++)
            if (event->seen[i] > seen[i]) seen[i] = event->seen[i];
    }
    pthread_mutex_unlock(&big);
    return error;
}

// ---- capture
static Graph* new_graph(void) {
    Graph* graph = calloc(1, sizeof *graph);
    graph->number = __sync_add_and_fetch(&graph_numbers, 1);
    graph->end = &graph->writes;
    return graph;
}

static cudaError_t begin(cudaStream_t handle, Graph* graph, enum cudaStreamCaptureMode mode) {
    Stream* stream = stream_of(handle);
    if (stream->number == 0)
        return refuse(NULL, "cudaStreamBeginCapture", "the default stream cannot be captured", cudaErrorStreamCaptureUnsupported);
    if (stream->capture) return refuse(NULL, "cudaStreamBeginCapture", "the stream is capturing", cudaErrorIllegalState);
    Capture* c = calloc(1, sizeof *c);
    pthread_mutex_lock(&big);
    c->number = ++numbers;
    c->mode = mode;
    c->thread = pthread_self();
    c->members = 1;
    c->member[0] = stream;
    c->graph = graph ? graph : new_graph();
    c->next = captures;
    captures = c;
    stream->capture = c;
    stream->member = 0;
    say("C begin capture=%d stream=%d device=%d mode=%s", c->number, stream->number, stream->device,
        mode == cudaStreamCaptureModeGlobal ? "global" : mode == cudaStreamCaptureModeThreadLocal ? "thread_local" : "relaxed");
    pthread_mutex_unlock(&big);
    return OK;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) { return begin(stream, NULL, mode); }
cudaError_t cudaStreamBeginCaptureToGraph(
    cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t* after, const cudaGraphEdgeData* edges, size_t n,
    enum cudaStreamCaptureMode mode) {
    return begin(stream, (Graph*)graph, mode);
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    Stream* stream = stream_of(handle);
    Capture* c = stream->capture;
    *graph = NULL;
    if (!c) return refuse(NULL, "cudaStreamEndCapture", "the stream is not capturing", cudaErrorIllegalState);
    pthread_mutex_lock(&big);
    cudaError_t error = OK;
    if (c->member[0] != stream)
        error = refuse(c, "cudaStreamEndCapture", "capture began in another stream", cudaErrorStreamCaptureUnmatched);
    else if (c->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(c->thread, pthread_self()))
        error = refuse(c, "cudaStreamEndCapture", "capture began in another thread", cudaErrorStreamCaptureWrongThread);
    else if (c->invalid)
        error = fail(cudaErrorStreamCaptureInvalidated);
    for (int i = 1; i < c->members && !error; i++)
        if (c->seen[0][i] < c->seen[i][i])
            error = refuse(c, "cudaStreamEndCapture", "a side stream was not joined", cudaErrorStreamCaptureUnjoined);
    for (int i = 0; i < c->members; i++) c->member[i]->capture = NULL;
    for (Capture** at = &captures; *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            break;
        }
    say("C end capture=%d graph=%d nodes=%d%s", c->number, c->graph->number, c->graph->nodes, error ? " failed" : "");
    if (!error) *graph = (cudaGraph_t)c->graph;
    free(c);
    pthread_mutex_unlock(&big);
    return error;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus* status) {
    Capture* c = stream_of(handle)->capture;
    *status = !c ? cudaStreamCaptureStatusNone : c->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return OK;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t handle, enum cudaStreamCaptureStatus* status, unsigned long long* number, cudaGraph_t* graph,
    const cudaGraphNode_t** after, const cudaGraphEdgeData** edges, size_t* n) {
    Capture* c = stream_of(handle)->capture;
    cudaStreamIsCapturing(handle, status);
    if (number) *number = c ? c->number : 0;
    if (graph) *graph = c ? (cudaGraph_t)c->graph : NULL;
    if (after) *after = NULL;
    if (edges) *edges = NULL;
    if (n) *n = 0;
    return OK;
}

// ---- graphs: an instantiated graph is the graph itself, and lives as long as the process
cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags) {
    *graph = (cudaGraph_t)new_graph();
    return OK;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
    *executable = (cudaGraphExec_t)graph;
    return OK;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(executable, graph, flags);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return unsafe("cudaGraphExecDestroy"); }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    *count = ((Graph*)graph)->nodes;
    return OK;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
    Graph* graph = (Graph*)executable;
    Stream* stream = stream_of(handle);
    int captured;
    cudaError_t error = enqueue(stream, &captured);
    if (error) return error;
    say("GL graph=%d nodes=%d device=%d stream=%d capture=%d", graph->number, graph->nodes, stream->device, stream->number, captured);
    for (Write* one = graph->writes; one && !captured; one = one->next) {
        if (kind_of(one->to, NULL) == NOWHERE || (one->from && kind_of(one->from, NULL) == NOWHERE)) {
            say("X cudaGraphLaunch: graph %d copies %zu bytes from or to memory that was freed", graph->number, one->bytes);
            return fail(cudaErrorIllegalAddress);
        }
        perform(one);
    }
    return OK;
}
