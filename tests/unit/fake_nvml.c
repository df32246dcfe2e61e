/* A libnvidia-ml.so.1 of two cards, for test_nvml.py and test_doctor.py. Card 0 counts everything, card 1 neither energy
   nor NVLink. FAKE_NVML_ILL=n: card 1 has n uncorrected errors, is hot and slowed down. Utilization and power go up from
   call to call; energy is 250 W by the clock. */
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <time.h>

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };

static const char *uuids[2] = {"GPU-11111111-aaaa-bbbb-cccc-000000000000", "GPU-22222222-aaaa-bbbb-cccc-000000000000"};
static char cards[2];
#define NUMBER(card) ((int)((char *)(card) - cards))

static int ill(void *card) { return NUMBER(card) == 1 && getenv("FAKE_NVML_ILL") ? atoi(getenv("FAKE_NVML_ILL")) : 0; }

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

int nvmlInitWithFlags(unsigned flags) { return OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == NOT_SUPPORTED ? "Not Supported" : "an error"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "999.88.77"); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **card) { *card = cards + i; return i < 2 ? OK : INVALID; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **card) {
    for (int i = 0; i < 2; i++)
        if (!strcmp(uuid, uuids[i])) { *card = cards + i; return OK; }
    return NOT_FOUND;
}
int nvmlDeviceGetUUID(void *card, char *text, unsigned size) { snprintf(text, size, "%s", uuids[NUMBER(card)]); return OK; }
int nvmlDeviceGetName(void *card, char *text, unsigned size) { snprintf(text, size, "NVIDIA Fake %d", NUMBER(card)); return OK; }

typedef struct { unsigned gpu, memory; } Utilization;
int nvmlDeviceGetUtilizationRates(void *card, Utilization *u) {
    static int calls[2];
    u->gpu = 10 * ++calls[NUMBER(card)] % 100; /* 10, 20, 30, ... percent */
    u->memory = 5;
    return OK;
}
typedef struct { unsigned long long total, free, used; } Memory;
int nvmlDeviceGetMemoryInfo(void *card, Memory *m) {
    m->total = 80ull << 30, m->used = (unsigned long long)(NUMBER(card) + 1) << 30, m->free = m->total - m->used;
    return OK;
}
int nvmlDeviceGetPowerUsage(void *card, unsigned *mw) {
    static int calls[2];
    *mw = 100000 * ++calls[NUMBER(card)]; /* 100, 200, 300, ... W */
    return OK;
}
int nvmlDeviceGetTotalEnergyConsumption(void *card, unsigned long long *mj) {
    if (NUMBER(card) == 1) return NOT_SUPPORTED;
    *mj = 250e3 * seconds();
    return OK;
}
/* no nvmlDeviceGetTemperatureV: an older driver */
int nvmlDeviceGetTemperature(void *card, int sensor, unsigned *c) { *c = ill(card) ? 89 : 61; return OK; }
int nvmlDeviceGetTemperatureThreshold(void *card, int which, unsigned *c) { *c = 90; return which == 1 ? OK : NOT_SUPPORTED; }
int nvmlDeviceGetClockInfo(void *card, int which, unsigned *mhz) { *mhz = which == 1 ? 1755 : 2619; return OK; }
int nvmlDeviceGetMaxClockInfo(void *card, int which, unsigned *mhz) { *mhz = 1980; return OK; }
int nvmlDeviceGetPcieThroughput(void *card, int way, unsigned *kib) { *kib = way ? 2000 : 1000; return OK; }
int nvmlDeviceGetCurrPcieLinkWidth(void *card, unsigned *lanes) { *lanes = NUMBER(card) ? 8 : 16; return OK; }
int nvmlDeviceGetMaxPcieLinkWidth(void *card, unsigned *lanes) { *lanes = 16; return OK; }
/* no nvmlDeviceGetCurrentClocksEventReasons either */
int nvmlDeviceGetCurrentClocksThrottleReasons(void *card, unsigned long long *bits) {
    static int calls;
    if (NUMBER(card) == 1) *bits = ill(card) ? 0x48 : 0; /* hardware slowdown, by heat */
    else *bits = calls++ % 2 ? 0x4 : 0x1; /* idle, power cap, idle, ... */
    return OK;
}
int nvmlDeviceGetEccMode(void *card, int *now, int *later) { *now = *later = 1; return OK; }
int nvmlDeviceGetTotalEccErrors(void *card, int kind, int since, unsigned long long *count) {
    *count = kind == 1 ? ill(card) : 0;
    return OK;
}
int nvmlDeviceGetRemappedRows(void *card, unsigned *a, unsigned *b, unsigned *pending, unsigned *failed) {
    *a = *b = *pending = *failed = 0;
    return OK;
}
int nvmlDeviceGetNvLinkState(void *card, unsigned link, unsigned *up) {
    if (NUMBER(card) == 1 || link >= 18) return NOT_SUPPORTED;
    *up = link != 7;
    return OK;
}
typedef struct {
    unsigned field, scope;
    long long stamp, latency;
    unsigned type;
    int code;
    union { double d; unsigned long long ull; unsigned ui; } value;
} Field;
int nvmlDeviceGetFieldValues(void *card, int count, Field *fields) {
    for (int i = 0; i < count; i++) {
        Field *f = fields + i;
        int ways = f->field == 138 || f->field == 139;
        f->code = NUMBER(card) == 0 && ways && f->scope == ~0u ? OK : NOT_SUPPORTED;
        f->type = 3;
        f->value.ull = (f->field == 138 ? 3e6 : 1e6) * seconds(); /* KiB: 3e6 and 1e6 a second */
    }
    return OK;
}
