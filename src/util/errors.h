#pragma once

#include <errno.h>

/* The errors that a user of the tree can meet: one table, the only place where a condition gets its
 * errno. Functions return these as `-ERR_…`. What is not in the table is logged and becomes EIO
 * (error_to_user), so that no surprise of a library reaches a user as if it were a promise. */
#define ERRORS(X)                                                                                  \
    X(NOT_FOUND, ENOENT, "no such VM, key or job")                                                 \
    X(EXISTS, EEXIST, "exists already")                                                            \
    X(INVALID, EINVAL, "bad id, key, verb or value")                                               \
    X(TOO_LARGE, EFBIG, "the value is too large")                                                  \
    X(COMMAND_TOO_LARGE, E2BIG, "the command is too large")                                        \
    X(NO_ROOM, ENOSPC, "no room for it")                                                           \
    X(CUT, EOVERFLOW, "output was cut: there was more")                                            \
    X(BUSY, EBUSY, "not in this state")                                                            \
    X(GONE, ENODEV, "the VM did not boot or is gone")                                              \
    X(TIMED_OUT, ETIMEDOUT, "no answer within the deadline")                                       \
    X(UNREACHABLE, EHOSTUNREACH, "connection refused or lost")                                     \
    X(DENIED, EACCES, "authentication or host key refused")                                        \
    X(COMMAND_FAILED, EREMOTEIO, "the command failed in the guest")                                \
    X(COMMAND_LOST, ECONNRESET, "the connection was lost while the command ran")                   \
    X(NO_READER, EPIPE, "the command takes no more input")                                         \
    X(UNSUPPORTED, EOPNOTSUPP, "this backend cannot do that")                                      \
    X(AGAIN, EAGAIN, "nothing yet, and O_NONBLOCK is set")                                         \
    X(INTERRUPTED, EINTR, "interrupted")                                                           \
    X(NOT_PERMITTED, EPERM, "not a thing that can be done to this file")                           \
    X(STALE, ESTALE, "the name has gone: look it up again")                                        \
    X(CROSS_DEVICE, EXDEV, "only within one directory")                                            \
    X(NOT_A_DIRECTORY, ENOTDIR, "not a directory")                                                 \
    X(IS_A_DIRECTORY, EISDIR, "is a directory")                                                    \
    X(NAME_TOO_LONG, ENAMETOOLONG, "the name is too long")                                         \
    X(NO_SYSTEM_CALL, ENOSYS, "not served: the kernel need not ask again")                         \
    X(NO_MEMORY, ENOMEM, "out of memory")                                                          \
    X(IO, EIO, "input/output error")

#define ERRORS_CONSTANT(name, number, text) ERR_##name = number,
enum error_condition { ERRORS(ERRORS_CONSTANT) };
#undef ERRORS_CONSTANT

/* Takes a status (0 or negative) and returns the errno for the user: 0 or positive, from the table.
 */
int error_to_user(int status);

/* What -errno of a file of the host comes to for the user: no room for it, or that it cannot be
 * written; whichever else it is says nothing about the tree. 0 stays. */
int error_of_host(int status);

/* What a status (0 or negative) means, in a few words. */
const char *error_text(int status);

/* Sets *ret_why to a sentence, which the caller frees (NULL: no memory for it), and returns the
 * status. */
int error_explain(int status, char **ret_why, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
