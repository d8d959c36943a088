#pragma once

#include <stdbool.h>

#include "util/buf.h"

/* Templates on the host's disk, for warm boots: STATE/templates/NAME, a folder (0700) with
 *
 *     ram            the guest's memory, which those who start from it share until they write
 *     state          everything else that the machine is
 *     template.json  what they were made from, and what they have to look like
 *
 * What a template is made from is its key, text in two parts: the image with its files, and the VMM
 * with the configuration. A template whose key is another today is not used, and goes when a newer
 * one of that image comes. Of all, the TEMPLATES_MOST used last are kept, in TEMPLATES_BYTES.
 *
 * Each start reads both files and compares their checksums, so damage of any kind is seen, unless
 * it comes later than that: who has started from a template reads its memory from the file for as
 * long as he lives. The checksum (CRC-32, of what is not zero) is against accidents; who can write
 * to the state directory can do as he likes anyway.
 *
 * A template holds nothing of a VM, see contrib/guest/README.md, and nothing changes it once it is
 * there: it appears by rename. Everything here blocks: it is for the thread pool, and for start-up.
 */

#define TEMPLATES_MOST 8
#define TEMPLATES_BYTES (2ULL << 30) /* as they lie on the disk */

/* What it is made from. The owner calls template_key_free(). */
struct template_key {
    char *image_path;   /* of the image's folder */
    struct buf image;   /* its files as they are today */
    struct buf machine; /* the VMM and the configuration */
};
void template_key_free(struct template_key *key);
int template_key_copy(struct template_key *ret_key, const struct template_key *from);
bool template_key_equals(const struct template_key *a, const struct template_key *b);

/* Appends how a file looks today: another one, or another content, looks different. */
int template_describe_file(const char *path, struct buf *out);

/* Its files. The owner calls template_close(). */
struct template {
    char *dir, *ram, *state;
};
void template_close(struct template *t);

/* The template of this key. -ENOENT: there is none. -EBADMSG: it was damaged, and is removed now;
 * *ret_why says how (the caller frees it). */
int template_open(const char *state_dir, const struct template_key *key, struct template *ret,
                  char **ret_why);

/* A folder for a new one, empty, under another name. Nothing is used of it, and what a killed
 * daemon has left of it is removed by templates_clear(). -ENOSPC: the disk has no room to spare for
 * `memory` MiB; variables and guests' disks come first. */
int template_begin(const char *state_dir, unsigned memory, struct template *ret);

/* It is complete: gives it its name, which `t` has from then on, and removes those that are too
 * many. */
int template_finish(const char *state_dir, struct template *t, const struct template_key *key);

void template_remove(const struct template *t);

/* Removes the templates that were used longest ago, until there are this many in so many bytes, and
 * those of the key's image that were made before it was changed. */
void templates_bound(const char *state_dir, const struct template_key *key, size_t most,
                     unsigned long long most_bytes);

/* Removes what template_begin() has made under a daemon that is no more; `each` is told of every
 * such folder before. */
void templates_clear(const char *state_dir, unsigned (*each)(const char *dir));
