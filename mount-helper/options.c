#include "options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Not for a file system, mount(8) and systemd.mount(5) say. */
static const char *const names_dropped[] = {
    "_netdev", "auto",    "comment", "defaults", "group", "helper",  "nofail", "noauto",
    "nogroup", "noowner", "nouser",  "nousers",  "owner", "uhelper", "user",   "users",
};

/* Flags of the kernel about times of access, of which this file system has none, about symbolic
 * links, likewise, and about what it does not do. Other file systems take them without a word,
 * libfuse refuses them. */
static const char *const names_idle[] = {
    "atime",       "diratime",   "iversion",   "lazytime",    "loud",       "mand",
    "nodiratime",  "noiversion", "nolazytime", "nomand",      "norelatime", "nostrictatime",
    "nosymfollow", "relatime",   "silent",     "strictatime", "symfollow",
};

struct option {
    const char *text;
    size_t length, name; /* of all, of what is before = */
};

static bool option_is_one_of(struct option o, const char *const *names, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (strlen(names[i]) == o.name && memcmp(names[i], o.text, o.name) == 0)
            return true;
    return false;
}

#define OPTION_IS_ONE_OF(o, names) option_is_one_of(o, names, sizeof(names) / sizeof *(names))

static bool option_is_dropped(struct option o) {
    bool prefixed = o.name > 2 && (o.text[0] == 'x' || o.text[0] == 'X') && o.text[1] == '-';
    return prefixed || OPTION_IS_ONE_OF(o, names_dropped) ||
           (o.name == o.length && OPTION_IS_ONE_OF(o, names_idle));
}

/* SELinux reads a context in quotes, which libfuse hands on to the kernel. */
static bool option_is_context(struct option o) {
    static const char *const names[] = {"context", "defcontext", "fscontext", "rootcontext"};
    return OPTION_IS_ONE_OF(o, names);
}

/* Up to the comma that ends it, which is none between quotes, nor after a backslash. False: a quote
 * is not closed. */
static bool option_next(const char *text, struct option *ret_option) {
    bool quoted = false;
    size_t i = 0;
    for (; text[i] && (quoted || text[i] != ','); i++) {
        if (text[i] == '\\' && text[i + 1])
            i++;
        else if (text[i] == '"' && (quoted || (i > 0 && text[i - 1] == '=')))
            quoted = !quoted;
    }
    size_t name = strcspn(text, "=");
    *ret_option = (struct option){text, i, name < i ? name : i};
    return !quoted;
}

/* The daemon knows no quotes; a comma behind a backslash is its own spelling. */
static void option_append(FILE *out, struct option o, bool first) {
    bool context = option_is_context(o);
    bool quoted = o.name + 1 < o.length && o.text[o.name + 1] == '"';
    if (!first)
        fputc(',', out);
    for (size_t i = 0; i < o.length; i++) {
        char c = o.text[i];
        if (c == '\\' && i + 1 < o.length) {
            fputc(c, out);
            fputc(o.text[++i], out);
        } else if (c == ',') {
            fputs("\\,", out);
        } else if (c != '"' || !quoted || context) {
            fputc(c, out);
        }
    }
}

int mount_options_add(struct mount_options *options, const char *list) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return -ENOMEM;
    bool first = !options->daemon || !options->daemon[0], remount = options->remount, ok = true;
    if (!first)
        fputs(options->daemon, out);
    while (ok && *list) {
        struct option o;
        ok = option_next(list, &o);
        if (ok && o.length == strlen("remount") && memcmp(o.text, "remount", o.length) == 0) {
            remount = true;
        } else if (ok && o.length > 0 && !option_is_dropped(o)) {
            option_append(out, o, first);
            first = false;
        }
        list += o.length;
        list += *list == ',';
    }
    bool failed = ferror(out);
    if (fclose(out) != 0 || failed || !ok) {
        free(text);
        return ok ? -ENOMEM : -EINVAL;
    }
    free(options->daemon);
    options->daemon = text;
    options->remount = remount;
    return 0;
}

/* Those that are so by default, and what `user` in fstab adds. */
static bool option_says_nothing(struct option o) {
    static const char *const names[] = {"async",  "dev",    "exec", "nodev",
                                        "noexec", "nosuid", "rw",   "suid"};
    return o.length == o.name && OPTION_IS_ONE_OF(o, names);
}

static bool list_has(const char *list, struct option wanted) {
    struct option o;
    for (; *list; list += o.length, list += *list == ',') {
        if (!option_next(list, &o))
            return false;
        if (o.length == wanted.length && memcmp(o.text, wanted.text, o.length) == 0)
            return true;
    }
    return false;
}

static bool list_is_part_of(const char *list, const char *of) {
    struct option o;
    for (; *list; list += o.length, list += *list == ',')
        if (!option_next(list, &o) || (!option_says_nothing(o) && !list_has(of, o)))
            return false;
    return true;
}

bool mount_options_same(const struct mount_options *a, const struct mount_options *b) {
    const char *one = a->daemon ? a->daemon : "", *other = b->daemon ? b->daemon : "";
    return list_is_part_of(one, other) && list_is_part_of(other, one);
}
