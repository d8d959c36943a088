#include "util/mounts.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "util/cleanup.h"

/* `\040` is a blank. */
static void mounts_unescape(char *text) {
    char *to = text;
    for (const char *from = text; *from; to++) {
        if (from[0] == '\\' && from[1] && from[2] && from[3]) {
            *to = (char)((from[1] - '0') << 6 | (from[2] - '0') << 3 | (from[3] - '0'));
            from += 4;
        } else {
            *to = *from++;
        }
    }
    *to = '\0';
}

/* `36 35 0:42 / /vms rw,nosuid shared:1 - fuse.vmsfs vms rw,user_id=0`. There may be any number of
 * fields before the hyphen, and blanks in none. */
static void mounts_take_line(char *line, mounts_visit *visit, void *arg) {
    static const char hyphen[] = " - ";
    char *fields[5], *behind = strstr(line, hyphen), *rest = NULL;
    if (!behind)
        return;
    *behind = '\0';
    behind += strlen(hyphen);
    behind[strcspn(behind, "\n")] = '\0';
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (!(fields[i] = strtok_r(i == 0 ? line : NULL, " ", &rest)))
            return;
    char *type = strtok_r(behind, " ", &rest), *options = strrchr(rest ? rest : "", ' ');
    if (!type)
        return;
    mounts_unescape(fields[4]);
    struct mounts_entry entry = {.device = fields[2],
                                 .path = fields[4],
                                 .type = type,
                                 .options = options ? options + 1 : ""};
    visit(arg, &entry);
}

int mounts_each(const char *file, mounts_visit *visit, void *arg) {
    FILE *mounts = fopen(file, "re");
    cleanup_free char *line = NULL;
    size_t size = 0;
    if (!mounts)
        return -errno;
    errno = 0;
    while (getline(&line, &size, mounts) >= 0)
        mounts_take_line(line, visit, arg);
    int error = feof(mounts) ? 0 : errno ? errno : EIO;
    fclose(mounts);
    return -error;
}
