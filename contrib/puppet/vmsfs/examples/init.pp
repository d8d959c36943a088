# puppet apply --modulepath contrib/puppet --hiera_config contrib/puppet/vmsfs/examples/hiera.yaml contrib/puppet/vmsfs/examples/init.pp
include vmsfs
