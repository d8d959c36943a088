#pragma once

#include <uv.h>

/* A file in which a VMM notes what happens, looked through for a word as it grows.
 *
 * It may grow without end, but what is kept of it is where the last look has ended. A file that was
 * truncated, or replaced by another, is looked through from its start. */

struct event_log;

/* Calls `found` once, when `word` (EVENT_LOG_WORD_MAX bytes at most) is in the file, from the loop
 * and never from inside here. The file need not be there yet. -ERR_NO_MEMORY. */
#define EVENT_LOG_WORD_MAX 64
int event_log_open(uv_loop_t *loop, const char *path, const char *word, void (*found)(void *arg),
                   void *arg, struct event_log **ret_log);

/* No callback comes after this. Frees it, in a later turn of the loop. NULL is allowed. */
void event_log_close(struct event_log *log);
