#pragma once

#include <jansson.h>
#include <sys/types.h>
#include <time.h>

/* What chmod, chown and utimes have made of a file: kept in memory and in the VM's record. */
struct look {
    mode_t mode; /* permission bits */
    uid_t uid;
    gid_t gid;
    struct timespec changed; /* mtime */
    struct timespec read;    /* atime; not recorded */
};

/* Adds it to a JSON object; what is as in `usual` is left out, but for the time. */
void look_save(const struct look *look, const struct look *usual, json_t *one);
/* Takes what the object says, and leaves the rest. */
void look_load(struct look *look, const json_t *one);
