/* A driver library with one GPU whose state is a line of the file FAKE_NVML: "FREE TOTAL PID CELSIUS" (PID 0: nobody).
 * TOTAL 0: the GPU is lost, as after it fell off the bus.
 * It lets the real binding, and everything above it, run where there is no GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gi, ci; } process_t;

static void state(unsigned long long *free_, unsigned long long *total, unsigned int *pid) {
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    *free_ = *total = 0;
    *pid = 0;
    if (!file) return;
    if (fscanf(file, "%llu %llu %u", free_, total, pid) != 3) *pid = 0;
    fclose(file);
}

int nvmlInitWithFlags(unsigned int flags) { return getenv("FAKE_NVML") ? 0 : 9; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "an error"; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) { *device = (void *)1; return 0; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned int size) { snprintf(text, size, "GPU-0123"); return 0; }
int nvmlDeviceGetName(void *device, char *text, unsigned int size) { snprintf(text, size, "Imaginary 9000"); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    unsigned int pid;
    state(&memory->free, &memory->total, &pid);
    memory->used = memory->total - memory->free;
    return memory->total ? 0 : 15;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned int *celsius) {
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    int found = file ? fscanf(file, "%*u %*u %*u %u", celsius) : 0;
    if (file) fclose(file);
    return found == 1 ? 0 : 3;
}
int nvmlDeviceGetUtilizationRates(void *device, unsigned int *percent) {
    percent[0] = 37; /* of the GPU; percent[1]: of its memory's bandwidth */
    percent[1] = 5;
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, process_t *found) {
    unsigned long long free_, total;
    unsigned int pid;
    state(&free_, &total, &pid);
    unsigned int room = *count;
    *count = pid ? 1 : 0;
    if (!pid) return 0;
    if (room < 1) return 7;
    memset(found, 0, sizeof *found);
    found->pid = pid;
    return 0;
}
