/* Memory that a thread keeps for its next job: `pixtral_scratch`. */
#include <pthread.h>
#include <stdlib.h>

#include "native.h"

#define LINE 64
#define PAGE 4096

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_key(void) {
    if (pthread_key_create(&key, free) != 0)
        abort();
}

void *pixtral_scratch(size_t size) {
    pthread_once(&once, make_key);
    size_t *held = pthread_getspecific(key); /* begins with its size, in a line of its own */
    if (held == NULL || *held < size) {
        free(held);
        size_t whole = (size + LINE + PAGE - 1) / PAGE * PAGE;
        held = aligned_alloc(PAGE, whole);
        if (held == NULL || pthread_setspecific(key, held) != 0)
            abort(); /* no memory for a few hundred KiB: nothing would go on anyway */
        *held = whole - LINE;
    }
    return (char *)held + LINE;
}
