#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>
#include <uv/tree.h>

#include "util/buf.h"
#include "vm/look.h"

/* Scratch: the temporary files and lock directories that tools make beside their target, and rename
 * onto it (design, section 2: staging). It lives in memory only, never reaches a guest, is bounded,
 * and expires. */

#define SCRATCH_FILE_LIMIT (4 << 20)
#define SCRATCH_BYTES_LIMIT (8 << 20) /* of one directory */
#define SCRATCH_COUNT_LIMIT 256
#define SCRATCH_FIRST_NUMBER (UINT64_C(1) << 31) /* for inode numbers */

struct vm;
struct scratches;

struct scratch {
    RB_ENTRY(scratch) entry;
    struct scratches *table; /* NULL: it has no name any more */
    unsigned refs;           /* the table's, one a node, one a handle */
    unsigned open;           /* handles */
    char *name;
    bool directory;
    struct buf content;
    struct look look;
    uint64_t number;
    uint64_t used; /* of uv_now() */
};

RB_HEAD(scratch_index, scratch);
RB_PROTOTYPE(scratch_index, scratch, entry, scratch_compare)

struct scratches *scratches_new(struct vm *vm);
void scratches_free(struct scratches *table);
/* What is in this table does not expire. */
void scratches_keep(struct scratches *table);
/* Asks `guard` before a file of this table is changed: 0, or -ERR_… with words in `error`. `length`
 * bytes are what it would have then, `newline` whether the last of them is one. */
typedef int scratch_guard(void *arg, const char *name, size_t length, bool newline);
void scratches_guard(struct scratches *table, scratch_guard *guard, void *arg);
struct scratch_index *scratches_index(struct scratches *table);

/* Is this name by itself that of scratch: a leading . or #, a trailing ~? */
bool scratch_name_is_special(const char *name);

struct scratch *scratch_find(struct scratches *table, const char *name);

/* Somebody does something with it; looking at it is not enough to keep it from expiring. */
void scratch_use(struct scratch *scratch);

/* A new one, without a new reference. -ERR_NO_ROOM: there are too many. */
int scratch_make(struct scratches *table, const char *name, bool directory, mode_t mode,
                 struct scratch **ret_scratch);

/* Takes the name away; who has it open keeps it. */
void scratch_remove(struct scratch *scratch);

/* Another name, replacing what has it. */
int scratch_rename(struct scratch *scratch, const char *new_name);

/* Changes the content: `length` bytes at `offset`, filling a gap with NUL. -ERR_TOO_LARGE,
 * -ERR_NO_ROOM, what the guard says; `error` has the words. */
int scratch_write(struct scratch *scratch, const char *data, size_t length, off_t offset);
int scratch_resize(struct scratch *scratch, off_t size);
/* Could it have this size? */
int scratch_check_room(const struct scratch *scratch, size_t size);
/* Could it be written to, or have another name, as it is? */
int scratch_check_guard(const struct scratch *scratch, const char *name);

struct scratch *scratch_ref(struct scratch *scratch);
void scratch_unref(struct scratch *scratch);
