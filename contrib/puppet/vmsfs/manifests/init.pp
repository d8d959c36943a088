# @summary The virtual machines of a vmsfs mount, as Hiera says.
#
# @param mount where vmsfs is mounted
# @param vms the parameters of a vmsfs::vm for each VM, by its id
# @param env variables of all of them. Those of a VM win
# @param secrets variables by the VM's id, whose values are neither shown nor logged
#
# @example
#   include vmsfs
class vmsfs (
  Pattern[/\A\//] $mount = '/vms',
  Hash[String, Hash[String, Any]] $vms = {},
  Hash[String, Variant[String, Integer]] $env = {},
  Sensitive[Hash[String, Hash[String, Variant[String, Integer]]]] $secrets = Sensitive({}),
) {
  $vms.each |$id, $parameters| {
    $own = { 'env' => {}, 'secrets' => $secrets.unwrap.get($id, {}) } + $parameters
    vmsfs::vm { $id:
      * => { 'mount' => $mount } + $own + {
        'env'     => $env + $own['env'],
        'secrets' => Sensitive($own['secrets']),
      },
    }
  }
}
