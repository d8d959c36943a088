#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "util/buf.h"

/* The output of a command, kept for its readers. The first bytes are kept in memory; when there are
 * more, all of it goes to a file without a name, which is gone with the daemon.
 *
 * At most `limit` bytes are kept, and a spool is one of two kinds: one that keeps what has come
 * first and drops the rest (`cut` tells its readers), or one that is `flowing`: its writer is to be
 * held back while it is full, and what has been read makes room for more. */

#define SPOOL_MEMORY (16 * 1024)
/* What a limit may be. */
#define SPOOL_LIMIT_LEAST (UINT64_C(64) << 10)
#define SPOOL_LIMIT_MOST (UINT64_C(1) << 40)
#define SPOOL_LIMIT_DEFAULT (UINT64_C(1) << 30)
/* How far a flowing spool may be overfilled by what is under way when its writer is held back, or
 * has ended. */
#define SPOOL_SLACK (3 * 1024 * 1024)

struct spool {
    struct buf memory; /* everything, while fd is -1 */
    int fd;            /* the owner's; -1: none yet */
    bool flowing;
    bool cut;       /* what came after `end` was dropped */
    uint64_t limit; /* bytes */
    uint64_t base;  /* offset of the file's first byte; of a file that is only read */
    uint64_t start; /* offset of the first byte that is kept */
    uint64_t end;   /* bytes that have come */
};

void spool_init(struct spool *spool, uint64_t limit, bool flowing);
void spool_free(struct spool *spool);

/* Takes output in. `dir` is where the file is made. Returns 0, or why something was dropped: -EFBIG
 * (the limit) or the errno of the file; once, then it is silently dropped. */
int spool_write(struct spool *spool, const char *dir, const char *data, size_t length);

/* Copies at most `length` bytes from `offset` on. Returns their number, 0 at the end, -EOVERFLOW
 * where bytes are missing (before `start`, or after a cut), or -errno. */
ssize_t spool_read(const struct spool *spool, uint64_t offset, char *data, size_t length);

/* Everything before `offset` has been read; of use to a flowing spool only. */
void spool_release(struct spool *spool, uint64_t offset);

/* Is it to be held back, or, after that, to go on? */
static inline bool spool_is_full(const struct spool *spool) {
    return spool->flowing && spool->end - spool->start >= spool->limit;
}
static inline bool spool_has_room(const struct spool *spool) {
    return !spool->flowing || spool->end - spool->start <= spool->limit / 2;
}
