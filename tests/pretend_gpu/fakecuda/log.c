// The log in memory, appended to the file FAKECUDA_LOG when the process ends; and CUDA's way with errors.
#include "fakecuda.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

pthread_mutex_t big = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char* text;
static size_t length, room;

void say(const char* format, ...) {
    char line[2048];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (n > (int)sizeof line - 2) n = sizeof line - 2;
    line[n++] = '\n';
    pthread_mutex_lock(&big);
    if (length + n + 1 > room) {
        room = 2 * (room + n + 4096);
        text = realloc(text, room);
    }
    memcpy(text + length, line, n);
    length += n;
    text[length] = 0;
    pthread_mutex_unlock(&big);
}

// For ctypes: the log so far, a mark of the caller's in it, and emptying it.
const char* fakecuda_log(void) { return text ? text : ""; }
void fakecuda_mark(const char* words) { say("# %s", words); }
void fakecuda_reset(void) {
    pthread_mutex_lock(&big);
    length = 0;
    if (text) text[0] = 0;
    pthread_mutex_unlock(&big);
}

void fakecuda_unmodelled(const char* name) { say("U %s", name); }  // the generated stubs say so at their first call

__attribute__((destructor)) static void write_out(void) {
    const char* name = getenv("FAKECUDA_LOG");
    FILE* file = name && length ? fopen(name, "a") : NULL;
    if (!file) return;
    flock(fileno(file), LOCK_EX);  // until it is closed: processes that share a log end at once
    fprintf(file, "P %d\n", (int)getpid());
    fwrite(text, 1, length, file);
    fclose(file);
}

int setting(const char* name, int otherwise) {
    const char* value = getenv(name);
    return value && *value ? atoi(value) : otherwise;
}

static __thread cudaError_t last;

cudaError_t fail(cudaError_t error) {
    if (error) last = error;
    return error;
}

cudaError_t cudaPeekAtLastError(void) { return last; }
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = OK;
    return error;
}

static const struct {
    int code;
    const char *name, *words;
} errors[] = {
    {0, "cudaSuccess", "no error"},
    {1, "cudaErrorInvalidValue", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {400, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {401, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {900, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"},
    {902, "cudaErrorStreamCaptureMerge", "operation would result in a merge of separate capture sequences"},
    {903, "cudaErrorStreamCaptureUnmatched", "capture was not ended in the same stream as it began"},
    {904, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {905, "cudaErrorStreamCaptureIsolation", "dependency created on uncaptured work in another stream"},
    {906, "cudaErrorStreamCaptureImplicit", "operation would make the legacy stream depend on a capturing blocking stream"},
    {907, "cudaErrorCapturedEvent", "operation not permitted on an event last recorded in a capturing stream"},
    {908, "cudaErrorStreamCaptureWrongThread", "attempt to terminate a thread-local capture sequence from another thread"},
};

static const char* describe(int code, int words) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return words ? errors[i].words : errors[i].name;
    return "unknown error";
}

const char* cudaGetErrorString(cudaError_t error) { return describe(error, 1); }
const char* cudaGetErrorName(cudaError_t error) { return describe(error, 0); }
CUresult cuGetErrorString(CUresult error, const char** words) {
    *words = describe(error, 1);
    return 0;
}
CUresult cuGetErrorName(CUresult error, const char** name) {
    *name = describe(error, 0);
    return 0;
}
