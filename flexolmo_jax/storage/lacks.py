"""What file systems may lack, by the errors that say so. What is lacking is done without."""

import errno

# EBADF: NFS locks only what is open for writing
LOCKS = (
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EINVAL,
    errno.EBADF,
)
SYNCING = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF)  # of folders
LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
MODES = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
